"""A trained mixture in vLLM on a real model: the tokens of transformers, and the engine's speed over the bare base.

python -m experiments.serving --model FOLDER --engine .envs/vllm/bin/python --out experiments/results/serving.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moa
from moa.serving.vllm.vllm_folder import export_vllm

from ..bench.common import environment

ENGINE = """
import json, sys, time
from vllm import LLM, SamplingParams

from vllm.lora.request import LoRARequest

folder, prompts, new, one_by_one, adapter, rounds, eager = json.loads(sys.argv[1])
options = {"enable_lora": True, "max_lora_rank": 16} if adapter else {}
lora = LoRARequest("adapter", 1, adapter) if adapter else None
model = LLM(folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=eager, max_model_len=256, max_num_seqs=64,
            gpu_memory_utilization=0.1, **options)
sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
def run(prompts):
    found = model.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, lora_request=lora)
    return [list(f.outputs[0].token_ids) for f in found]
together = run(prompts)
alone = [run([p])[0] for p in prompts[:one_by_one]]
rates = []
for _ in range(rounds):
    start, cpu = time.perf_counter(), time.process_time()
    run(prompts[:16])
    rates.append([16 * new / (time.perf_counter() - start), 16 * new / (time.process_time() - cpu)])
print("RESULT" + json.dumps({"together": together, "alone": alone, "rates": rates}), flush=True)
"""


def engine(
    python: Path,
    folder: Path,
    prompts: list[list[int]],
    new: int,
    one_by_one: int = 0,
    adapter: Path | None = None,
    rounds: int = 3,
    eager: bool = True,
) -> dict[str, Any]:
    """Return what the engine generates from a folder for prompts of token ids, and its tokens a second, 16 at once.

    Rates are pairs: by the clock, and by the process's CPU time, which other work on the machine does not change.
    """
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    given = [str(folder), prompts, new, one_by_one, adapter and str(adapter), rounds, eager]
    words = [str(python), "-c", ENGINE, json.dumps(given)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **settings}, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


def plain_lora(folder: Path, to: Path, rank: int = 16) -> Path:
    """Return the folder of a LoRA of random factors on every linear of a base, as the engine's own LoRA serves it."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(to)
    return to


def trained(folder: Path, texts: list[str], steps: int) -> tuple[moa.MoAModel, Any]:
    """Return a mixture after some optimizer steps on texts, and the tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = moa.build(base, router="topk", n_experts=8, k=2, rank=8, targets="all-linear").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(steps):
        ids = tokenizer(texts[step % len(texts)], return_tensors="pt").input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def main() -> None:
    """Compare and measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engine", type=Path, default=Path(".envs/vllm/bin/python"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--one-by-one", type=int, default=64)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2, help="for speed, of each kind, in turn")
    parser.add_argument("--compiled", action="store_true", help="measure the speed of compiled graphs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    docs = [line for line in Path("docs/recipes.md").read_text().splitlines() if len(line) > 60]
    model, tokenizer = trained(options.model, docs[:8], options.steps)
    prompts = [tokenizer(f"{n}. {docs[n % len(docs)]}").input_ids[: 12 + n % 30] for n in range(options.prompts)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": options.new, "do_sample": False}
        made = model.generate(ids, min_new_tokens=options.new, **how)
        expected.append(made[0, len(prompt) :].tolist())
    rates: dict[str, list[list[float]]] = {"base": [], "mixture": [], "lora": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_vllm(model, Path(scratch) / "mixture")
        adapter = plain_lora(options.model, Path(scratch) / "lora")
        mixture = engine(options.engine, folder, prompts, options.new, options.one_by_one)
        plain = engine(options.engine, options.model, prompts, options.new)
        ask = {"prompts": prompts[:16], "new": options.new, "eager": not options.compiled}
        for _ in range(options.processes):
            rates["base"] += engine(options.engine, options.model, **ask)["rates"]
            rates["mixture"] += engine(options.engine, folder, **ask)["rates"]
            rates["lora"] += engine(options.engine, options.model, adapter=adapter, **ask)["rates"]
    median = {
        name: {kind: statistics.median(pair[n] for pair in found) for n, kind in enumerate(("clock", "cpu"))}
        for name, found in rates.items()
        if found
    }
    result = {
        "command": "python -m experiments.serving --model FOLDER --processes 2",
        "environment": environment(),
        "prompts": len(prompts),
        "new_tokens": options.new,
        "equal_together": sum(a == b for a, b in zip(mixture["together"], expected, strict=True)),
        "equal_one_by_one": sum(a == b for a, b in zip(mixture["alone"], expected, strict=False)),
        "one_by_one": len(mixture["alone"]),
        "moved_by_the_mixture": sum(a != b for a, b in zip(plain["together"], expected, strict=True)),
        "compiled": options.compiled,
        "processes": options.processes,
        "tokens_per_second_16_at_once": median,
        "mixture_over_base": {k: median["mixture"][k] / median["base"][k] for k in ("clock", "cpu")}
        if median
        else None,
        "mixture_over_lora": {k: median["mixture"][k] / median["lora"][k] for k in ("clock", "cpu")}
        if median
        else None,
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
