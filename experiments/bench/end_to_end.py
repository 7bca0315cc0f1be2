"""What a user feels: a whole training step and generated tokens per second of the real SmolLM2-135M, every linear of
its 30 blocks adapted, moa's top-k mixture against peft's systems and a MoLA-style loop; and each one's peak memory.

`topk`, X-LoRA, Arrow and the loop hold 8 experts of rank 8, Poly 8 skills of rank 8, LoRA has rank 64: all the same
parameters but for their routers. Arrow has no training. Time is process CPU time, interleaved in one run; memory is
the peak of a process of its own that takes one training step, beyond what it held before the step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moa.runs.demo import cache_folder

from .common import interleaved, write
from .model_systems import adapters, inputs, systems, trained

COMMAND = "python -m experiments.bench.end_to_end"


def base_model(folder: str) -> Any:
    """Return the decoder in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return a whole step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generation(model: Any, prompt: dict[str, Tensor], n_tokens: int) -> Callable[[], None]:
    """Return greedy generation of n_tokens per prompt with a cache."""

    def run() -> None:
        model.eval()
        with torch.no_grad():
            out = model.generate(
                **prompt, min_new_tokens=n_tokens, max_new_tokens=n_tokens, do_sample=False, use_cache=True
            )
        assert out.shape[1] == prompt["input_ids"].shape[1] + n_tokens

    return run


def peak_bytes(name: str, options: argparse.Namespace) -> int:
    """Return the peak memory of one training step in a process of its own, beyond what it held before the step."""
    command = [sys.executable, "-m", "experiments.bench.end_to_end", "--only", name, "--model", options.model]
    command += ["--batch", str(options.batch), "--length", str(options.length)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(json.loads(out.splitlines()[-1])["peak"])


def alone(name: str, options: argparse.Namespace, experts: Callable[[], list[str]]) -> None:
    """Print the peak of one training step of one system."""
    model = systems(partial(base_model, options.model), experts)[name]()
    step = training_step(model, inputs(name, options.batch, options.length))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    step()
    print(json.dumps({"peak": memory("VmHWM") - before}))


def memory(kind: str) -> int:
    """Return a line of this process's status in bytes: VmRSS is what it holds, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def main() -> None:
    """Measure all of it and write experiments/results/end_to_end.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(cache_folder() / "SmolLM2-135M-Instruct-dequantised"))
    parser.add_argument("--only", help="one system: print the peak memory of its training step")
    for name, default in (("rounds", 5), ("batch", 2), ("length", 64), ("tokens", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if not Path(options.model).exists():
        parser.error(f"no model at {options.model}: `moa demo --model smollm2 --prepare` puts it there.")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as into:
        made: list[str] = []

        def experts() -> list[str]:
            if not made:
                made.extend(adapters(partial(base_model, options.model), into))
            return made

        if options.only:
            alone(options.only, options, experts)
            return
        models = {name: make() for name, make in systems(partial(base_model, options.model), experts).items()}
    steps = {n: training_step(m, inputs(n, options.batch, options.length)) for n, m in models.items() if trained(n)}
    times = interleaved(steps, options.rounds, warmup=1)
    decodes = interleaved(
        {n: generation(m, inputs(n, 1, 16), options.tokens) for n, m in models.items()}, options.rounds, warmup=1
    )
    ours = "moa topk 8x8 k=2"
    rows: dict[str, Any] = {}
    print(f"{'':26s}{'step ms':>9s}{'/ moa':>7s}{'peak MB':>9s}{'tokens/s':>10s}{'moa /':>7s}{'trainable':>12s}")
    for name, model in models.items():
        speed = options.tokens / decodes[name]["min_s"]
        row: dict[str, Any] = {
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "generation": decodes[name],
            "tokens_per_second": speed,
            "moa_speed_over_this": options.tokens / decodes[ours]["min_s"] / speed,
        }
        if trained(name):
            row["step"] = times[name]
            row["step_over_moa"] = times[name]["min_s"] / times[ours]["min_s"]
            row["peak_bytes"] = peak_bytes(name, options)
        rows[name] = row
        step = (
            f"{times[name]['min_s'] * 1e3:9.0f}{row['step_over_moa']:7.2f}" if trained(name) else f"{'-':>9s}{'-':>7s}"
        )
        peak = f"{row['peak_bytes'] / 1e6:9.0f}" if trained(name) else f"{'-':>9s}"
        print(f"{name:26s}{step}{peak}{speed:10.1f}{row['moa_speed_over_this']:7.2f}{row['trainable']:12,}", flush=True)
    shape = {key: getattr(options, key) for key in ("batch", "length", "tokens", "rounds")}
    print(write("end_to_end", {"model": Path(options.model).name, "shape": shape, "rows": rows}, COMMAND))


if __name__ == "__main__":
    main()
