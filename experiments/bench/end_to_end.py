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
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moa
from moa.runs.demo import cache_folder

from .common import interleaved, write
from .kernel_baselines import mola_loop

COMMAND = "python -m experiments.bench.end_to_end"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_EXPERTS, RANK, K = 8, 8, 2


class LoopLinear(nn.Module):
    """A frozen linear and experts behind a softmax top-k gate, one Python pass per expert, as MoLA runs them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.gate = nn.Linear(base.in_features, N_EXPERTS, bias=False)
        self.down = nn.Parameter(torch.randn(N_EXPERTS, RANK, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.randn(N_EXPERTS, RANK, base.out_features) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return (*rows, o) of x (*rows, i)."""
        kept, indices = self.gate(x).topk(K, -1)
        flat = (value.reshape(-1, value.shape[-1]) for value in (kept.softmax(-1), indices))
        mixed = mola_loop(x.reshape(-1, x.shape[-1]), self.down, self.up, *flat)
        return self.base(x) + mixed.view(*x.shape[:-1], -1)


def base_model(folder: str) -> Any:
    """Return the decoder in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def loop(folder: str) -> nn.Module:
    """Return the decoder with a `LoopLinear` for every linear of its blocks."""
    model = base_model(folder).requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS:
                setattr(module, name, LoopLinear(child))
    return model


def adapters(folder: str, into: str) -> list[str]:
    """Return folders of 8 LoRAs of rank 8 in peft's format."""
    model = peft.get_peft_model(
        base_model(folder), peft.LoraConfig(r=RANK, target_modules=LINEARS, init_lora_weights=False)
    )
    paths = [str(Path(into) / str(e)) for e in range(N_EXPERTS)]
    for path in paths:
        model.save_pretrained(path)
    return paths


def systems(folder: str, experts: Callable[[], list[str]]) -> dict[str, Callable[[], nn.Module]]:
    """Return name -> what makes the model."""

    def xlora() -> nn.Module:
        model = base_model(folder)
        model.config.use_cache = False  # its training forward refuses a cache
        named = {str(e): path for e, path in enumerate(experts())}
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=named, use_trainable_adapters=True
        )
        return peft.get_peft_model(model, config)

    def of(config: peft.PeftConfig) -> nn.Module:
        return peft.get_peft_model(base_model(folder), config)

    return {
        "frozen base": lambda: base_model(folder).requires_grad_(False),
        "moa topk 8x8 k=2": lambda: moa.build(base_model(folder), "topk", N_EXPERTS, K, rank=RANK, targets=LINEARS),
        "peft LoRA r64": lambda: of(peft.LoraConfig(r=64, target_modules=LINEARS, task_type="CAUSAL_LM")),
        "peft Poly 8x8": lambda: of(
            peft.PolyConfig(r=RANK, n_skills=N_EXPERTS, n_tasks=4, target_modules=LINEARS, task_type="CAUSAL_LM")
        ),
        "peft X-LoRA 8x8": xlora,
        "peft Arrow 8x8 k=2": lambda: peft.create_arrow_model(base_model(folder), experts(), peft.ArrowConfig(top_k=K)),
        "MoLA-style loop 8x8 k=2": lambda: loop(folder),
    }


def trained(name: str) -> bool:
    """Return whether the system has a training step: Arrow has none, nor has the base alone."""
    return name not in ("frozen base", "peft Arrow 8x8 k=2")


def inputs(name: str, batch: int, length: int) -> dict[str, Tensor]:
    """Return the arguments of a forward; Poly takes tasks."""
    ids = torch.randint(5, 40_000, (batch, length), generator=torch.Generator().manual_seed(0))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**found, "task_ids": torch.arange(batch) % 4} if "Poly" in name else found


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
    model = systems(options.model, experts)[name]()
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
                made.extend(adapters(options.model, into))
            return made

        if options.only:
            alone(options.only, options, experts)
            return
        models = {name: make() for name, make in systems(options.model, experts).items()}
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
