"""A whole training step of the demo's model: moa's top-k mixture against peft's LoRA, X-LoRA and Poly.

All adapt every linear of the six blocks. `topk` holds 8 experts of rank 8, k = 2; LoRA has rank 64 (same parameters);
X-LoRA mixes 8 LoRAs of rank 8; Poly 8 skills of rank 8. The model has all-MiniLM-L6-v2's shape with random weights:
time does not depend on their values. On one thread CPU time is measured, on several wall time, as training runs.
"""

from __future__ import annotations

import argparse
import os
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
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64], help="32 is the demo's")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}), help="one, and all cores")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    shapes = {
        f"{options.batch} x {length}, threads {threads}": measure(options, length, threads)
        for threads in options.threads
        for length in options.lengths
    }
    print(write("step", {"rounds": options.rounds, "cores": cores, "shapes": shapes}, COMMAND))


def measure(options: argparse.Namespace, length: int, threads: int) -> dict[str, Any]:
    """Return each system's step on one shape of batch."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    ids = torch.randint(5, 30000, (options.batch, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(options.batch) % 2}
    tasks = {**batch, "task_ids": torch.arange(options.batch) % 5}
    targets = {"targets": LINEARS}
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "frozen base": (frozen(), batch),
        "moa topk 8x8 k=2": (moa.build(encoder(), "topk", 8, 2, rank=8, **targets), batch),
        "moa remix 8x8 k=2 M=2": (moa.build(encoder(), "remix", 8, 2, rank=8, **targets), batch),
        "peft LoRA r64": (lora(64), batch),
        "peft X-LoRA 8x8": (xlora(), batch),
        "peft Poly 8x8": (poly(), tasks),
    }
    steps = {name: stepper(model, inputs) for name, (model, inputs) in models.items()}
    times = interleaved(steps, options.rounds, clock=clock)
    ours, rows = times["moa topk 8x8 k=2"], {}
    print(f"batch {options.batch} x {length}, threads {threads}: moa topk / this, of the least and of the median")
    for name, taken in times.items():
        trainable = sum(p.numel() for p in models[name][0].parameters() if p.requires_grad)
        least, middle = ours["min_s"] / taken["min_s"], ours["median_s"] / taken["median_s"]
        rows[name] = {**taken, "trainable": trainable, "moa_over_this": least, "moa_over_this_median": middle}
        print(f"{name:24s} {taken['min_s'] * 1e3:8.1f} ms   {least:5.2f} {middle:5.2f}   {trainable:,}", flush=True)
    return rows


if __name__ == "__main__":
    main()
