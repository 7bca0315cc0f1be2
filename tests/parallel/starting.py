"""Starts from data in one of several processes, each with batches of its own. Run: tests/parallel/test_starting.py"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed

import moa
from tests import models

CASES = {
    "eva": {"rank": 2, "n_experts": 2, "router": "topk", "k": 1},
    "qwha": {"density": 0.2, "n_experts": 1, "router": "fixed", "expert": "qwha", "mask": "given"},
    "lora-sb": {"rank": 3, "n_experts": 1, "router": "fixed", "expert": "core", "save_bases": True},
}


def batches(n: int = 4) -> list[dict[str, torch.Tensor]]:
    """Return n batches, of unlike lengths; the last one is a single row."""
    rng = torch.Generator().manual_seed(5)
    out = []
    for number in range(n):
        rows = 1 if number == n - 1 else 5
        ids = torch.randint(1, models.VOCAB, (rows, 4 + number), generator=rng)
        out.append({"input_ids": ids, "labels": torch.arange(rows) % models.CLASSES})
    return out


def started(method: str, data: list[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return what a fresh mixture's experts start at, and the shares that it holds."""
    base, options = models.bert().double(), {}
    if method == "qwha":
        options["original"] = models.bert().double()
        with torch.no_grad():
            for layer in base.modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.copy_((layer.weight * 20).round() / 20)
    model = moa.build(base, **CASES[method]).double()
    shares = moa.initialize(model, data, method, **options)
    return {name: t for name, t in model.state_dict().items() if ".bank." in name}, shares


def main(rank: int, n: int, folder: str) -> None:
    """Start from every n-th batch, and leave the result."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=n)
    found = {method: started(method, batches()[rank::n]) for method in CASES}
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
