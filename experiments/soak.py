"""A long run with the monitor, and many generations: memory, handles and the time of a step stay as they were.

python -m experiments.soak --steps 2000 --generations 1000 --out experiments/results/soak.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import moa
from experiments.bench.common import environment

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOWS = 10


def mixture() -> moa.MoAModel:
    """Return a small decoder with gates on all its linear layers."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, pad_token_id=0, **SHAPE))
    return moa.build(base, "topk", n_experts=4, k=2, rank=4)


def batch(number: int) -> dict[str, torch.Tensor]:
    """Return ids (4, S) of one of a few lengths S."""
    draw = torch.Generator().manual_seed(number)
    ids = torch.randint(3, 64, (4, 8 + 4 * (number % 4)), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def resident() -> int:
    """Return this process's memory in bytes, as the system counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def handles() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def watched(what: str, times: int, once: Callable[[int], None], written: Path) -> dict[str, Any]:
    """Do something often; return memory, handles, time and what was written at the end of each of ten windows.

    Args:
        what: in words.
        times: how often.
        once: does it, with its number from 1.
        written: folder whose size is read.
    """
    rows, seconds = [], []
    for number in tqdm(range(1, times + 1), desc=what):
        start = time.perf_counter()
        once(number)
        seconds.append(time.perf_counter() - start)
        if number % max(1, times // WINDOWS) == 0:
            rows.append(
                {
                    "done": number,
                    "memory_mb": round(resident() / 2**20, 2),
                    "handles": handles(),
                    "median_ms": round(statistics.median(seconds) * 1e3, 3),
                    "written_kb": round(sum(p.stat().st_size for p in written.rglob("*") if p.is_file()) / 1e3, 1),
                }
            )
            seconds.clear()
    first, last = rows[min(1, len(rows) - 1)], rows[-1]  # the first window warms up
    return {
        "times": times,
        "windows": rows,
        "memory_grown_mb": round(last["memory_mb"] - first["memory_mb"], 2),
        "handles_grown": last["handles"] - first["handles"],
        "time_ratio": round(last["median_ms"] / first["median_ms"], 3),
    }


def main() -> None:
    """Train, generate, print and keep the figures."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--steps", type=int, default=2000)
    words.add_argument("--generations", type=int, default=1000)
    words.add_argument("--every", type=int, default=10, help="steps from one log step to the next")
    words.add_argument("--out", type=Path)
    arguments = words.parse_args()
    torch.set_num_threads(1)
    model = mixture()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        monitor = moa.RoutingMonitor(folder, every=arguments.every)
        monitor.attach(model)

        def step(number: int) -> None:
            ids = batch(number)
            model.train()(**ids, labels=ids["input_ids"]).loss.backward()
            optimizer.step()
            monitor.step(number)
            optimizer.zero_grad()

        def generate(number: int) -> None:
            with torch.no_grad():
                model.eval().generate(**batch(number), max_new_tokens=4, do_sample=False)

        training = watched("steps", arguments.steps, step, Path(folder))
        generating = watched("generations", arguments.generations, generate, Path(folder))
        monitor.close()
        lines = max(1, arguments.steps // arguments.every)
        sizes = {
            "events_kb": sum(p.stat().st_size for p in Path(folder).rglob("events*")) / 1e3 / lines,
            "log_kb": (Path(folder) / "routing.jsonl").stat().st_size / 1e3 / lines,
        }
    result = {
        "command": f"python -m experiments.soak --steps {arguments.steps} --generations {arguments.generations}",
        "environment": environment(),
        "training": training,
        "generating": generating,
        "per_log_step": {name: round(value, 2) for name, value in sizes.items()},
    }
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
