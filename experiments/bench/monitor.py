"""What `RoutingMonitor` costs: the training step with and without it, alternating in one run.

    python -m experiments.bench.monitor [--pairs 40] [--every 10]

Writes experiments/results/monitor.json. `step_ratio` compares whole steps, with and without. `watch` is the time inside
the monitor on a step that logs nothing, `log` what a log step adds, images included: they are measured on their own,
because a busy machine makes steps differ by more than the monitor costs. `overhead` = (watch + log / every) / step.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

import moa
from moa.monitor.statistics import RoutingCollapseWarning

RESULT = Path(__file__).parent.parent / "results" / "monitor.json"
BATCH, LENGTH, N_TASKS = 16, 48, 4


def model_and_batch() -> tuple[moa.MoAModel, dict[str, torch.Tensor]]:
    """Return a random model of all-MiniLM-L6-v2's size with topk 8 × rank 8, k = 2, and a padded batch (16, 48)."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=3
    )
    base = BertForSequenceClassification(config)
    model = moa.build(base, router="topk", n_experts=8, k=2, rank=8, targets="all-linear")
    mask = (torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (BATCH, 1))).long()
    batch = {
        "input_ids": torch.randint(1000, 30000, (BATCH, LENGTH)),
        "attention_mask": mask,
        "labels": torch.arange(BATCH) % 3,
        "task_ids": torch.arange(BATCH) % N_TASKS,
    }
    return model.train(), batch


def measure(pairs: int, every: int) -> dict[str, Any]:
    """Return times in ms and ratios over pairs of one step without and one step with the monitor, batch (16, 48)."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RoutingCollapseWarning)  # a random model's attention outputs are all alike
    model, batch = model_and_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def watched(call: Callable[..., Any], *args: Any) -> None:
        nonlocal inside
        start = time.perf_counter()
        call(*args)
        inside += 1e3 * (time.perf_counter() - start)

    def step(monitor: moa.RoutingMonitor | None, count: int) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        if monitor is not None:
            watched(monitor.step, count)
        optimizer.zero_grad()
        return 1e3 * (time.perf_counter() - start)

    off_ms: list[float] = []
    on_ms: list[float] = []
    watch_ms: list[float] = []
    log_ms: list[float] = []
    inside = 0.0
    with tempfile.TemporaryDirectory() as folder:
        monitor = moa.RoutingMonitor(folder, every=10**9, tasks=N_TASKS)
        monitor.attach(model)
        observers = [functools.partial(watched, observer) for observer in model.observers]
        for count in range(pairs + 3):
            model.observers[:] = []
            without = step(None, count)
            model.observers[:] = observers
            inside = 0.0
            with_it = step(monitor, count + 1)
            start = time.perf_counter()
            monitor.log(count + 1)
            logged = 1e3 * (time.perf_counter() - start)
            if count >= 3:
                off_ms.append(without)
                on_ms.append(with_it)
                watch_ms.append(inside)
                log_ms.append(logged)
        n_layers = len(monitor.last)
        monitor.close()
    return {
        "shape": {"batch": BATCH, "length": LENGTH, "layers": n_layers, "experts": 8, "k": 2, "tasks": N_TASKS},
        "pairs": pairs,
        "every": every,
        "step_off_ms": _spread(off_ms),
        "step_on_ms": _spread(on_ms),
        "log_step_ms": _spread(log_ms),
        "watch_ms": _spread(watch_ms),
        "step_ratio": {"min": min(on_ms) / min(off_ms), "median": statistics.median(on_ms) / statistics.median(off_ms)},
        "overhead": {
            name: (pick(watch_ms) + pick(log_ms) / every) / pick(off_ms)
            for name, pick in (("min", min), ("median", statistics.median))
        },
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    given = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        **measure(given.pairs, given.every),
        "device": _cpu(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "moa": moa.__version__,
        "commit": commit,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
