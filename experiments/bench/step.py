"""A whole training step of the demo's model: moa's top-k mixture against peft's LoRA, X-LoRA and Poly.

All adapt every linear of the six blocks. `topk` holds 8 experts of rank 8, k = 2; LoRA has rank 64 (same parameters);
X-LoRA mixes 8 LoRAs of rank 8; Poly 8 skills of rank 8. The model has all-MiniLM-L6-v2's shape with random weights:
time does not depend on their values. On one thread CPU time is measured, on several wall time, as training runs.

Where a process happens to lay out its tensors moves one system against another by up to 10 %: each shape is measured
in several processes, and the median of their ratios is what counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PolyConfig, XLoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import moa

from .common import interleaved, write

COMMAND = "python -m experiments.bench.step"
OURS = "moa topk 8x8 k=2"
LINEARS = ["query", "key", "value", "intermediate.dense", "output.dense"]  # every linear of every block


class BodyNamedModel(BertForSequenceClassification):
    """The same classifier with its body called `model`: peft's X-LoRA reads adapters of such models alone."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.model = self._modules.pop("bert")

    @property
    def bert(self) -> nn.Module:
        """The body, under the name that forward uses."""
        return self._modules.get("model", self._modules.get("bert"))


def encoder(kind: type[BertForSequenceClassification] = BertForSequenceClassification) -> BertForSequenceClassification:
    """Return a classifier of all-MiniLM-L6-v2's shape."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=2,
        use_cache=False,
    )
    return kind(config)


def frozen() -> nn.Module:
    """Return the base alone, its head trained."""
    model = encoder()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def lora(rank: int) -> nn.Module:
    """Return peft's LoRA on every linear of the encoder."""
    return get_peft_model(encoder(), LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS, task_type="SEQ_CLS"))


def xlora() -> nn.Module:
    """Return peft's X-LoRA over 8 LoRAs of rank 8, which train along with the classifier of scalings."""
    with tempfile.TemporaryDirectory() as folder:
        adapters = {}
        for e in range(8):
            path = Path(folder) / str(e)
            get_peft_model(encoder(BodyNamedModel), LoraConfig(r=8, target_modules=LINEARS)).save_pretrained(path)
            adapters[str(e)] = str(path)
        config = XLoraConfig(hidden_size=384, adapters=adapters, use_trainable_adapters=True)
        return get_peft_model(encoder(BodyNamedModel), config)


def poly() -> nn.Module:
    """Return peft's Poly: 8 skills of rank 8, 5 tasks."""
    config = PolyConfig(r=8, n_skills=8, n_tasks=5, target_modules=LINEARS, task_type="SEQ_CLS")
    return get_peft_model(encoder(), config)


def stepper(model: nn.Module, batch: dict[str, Any]) -> Callable[[], None]:
    """Return one whole training step: forward, backward, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time all of them in turn and write experiments/results/step.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64], help="32 is the demo's")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="one, and all cores")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    shapes = {}
    for threads in options.threads:
        for length in options.lengths:
            name = f"{options.batch} x {length}, threads {threads}"
            job = (options.batch, length, threads, options.rounds)
            runs = []
            for _ in range(options.processes):
                with spawn.Pool(1) as pool:
                    runs.append(pool.apply(measure, job))
            shapes[name] = summary(name, runs)
    found = {"rounds": options.rounds, "processes": options.processes, "cores": cores, "shapes": shapes}
    print(write("step", found, f"{COMMAND} --rounds {options.rounds} --processes {options.processes}"))


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each system's times in every process, and moa's over them: the median of the processes' ratios."""
    print(f"batch {name}: moa topk / this, median of {len(runs)} processes (least, greatest)")
    rows = {}
    for system, first in runs[0].items():
        row: dict[str, Any] = {"trainable": first["trainable"]}
        for kind in ("min_s", "median_s"):
            row[kind] = [run[system][kind] for run in runs]
            row[f"moa_over_this_{kind}"] = [run[OURS][kind] / run[system][kind] for run in runs]
        ratios = row["moa_over_this_min_s"]
        row["moa_over_this"] = statistics.median(ratios)
        rows[system] = row
        low, middle, high = min(ratios), row["moa_over_this"], max(ratios)
        print(f"{system:24s} {min(row['min_s']) * 1e3:8.1f} ms   {middle:5.2f} ({low:.2f}, {high:.2f})", flush=True)
    return rows


def measure(batch_size: int, length: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return each system's step on one shape of batch, with its trainable parameters."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    ids = torch.randint(5, 30000, (batch_size, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch_size) % 2}
    tasks = {**batch, "task_ids": torch.arange(batch_size) % 5}
    targets = {"targets": LINEARS}
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "frozen base": (frozen(), batch),
        OURS: (moa.build(encoder(), "topk", 8, 2, rank=8, **targets), batch),
        "moa remix 8x8 k=2 M=2": (moa.build(encoder(), "remix", 8, 2, rank=8, **targets), batch),
        "peft LoRA r64": (lora(64), batch),
        "peft X-LoRA 8x8": (xlora(), batch),
        "peft Poly 8x8": (poly(), tasks),
    }
    steps = {name: stepper(model, inputs) for name, (model, inputs) in models.items()}
    times: dict[str, Any] = interleaved(steps, rounds, clock=clock)
    for name, (model, _) in models.items():
        times[name]["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return times


if __name__ == "__main__":
    main()
