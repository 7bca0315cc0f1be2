"""Every recipe on a small model: loss and gradients on the GPU against a CPU's, and a training step in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import moa
from moa.recipes import RECIPES

from ..bench.systems import N_TASKS, decoder, recipe, with_all_trained
from .book import Row
from .machine import Machine
from .pretended import choose_as_on_a_gpu

REAL = (4, 64, 2, 128)  # rows, length, layers, width
NEAR = 2e-3  # of the largest value: fp32 sums in another order, through two blocks


def model_of(name: str, layers: int, width: int) -> Any:
    """Return a small decoder under a recipe, every factor away from zero, always the same."""
    torch.manual_seed(0)
    model = moa.build(decoder(layers, width), recipe(name))
    torch.manual_seed(1)
    return with_all_trained(model)


def batch_of(name: str, rows: int, length: int) -> dict[str, Tensor]:
    """Return ids, labels, and tasks where the recipe routes by them."""
    ids = torch.randint(3, 2000, (rows, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    if "n_tasks" in RECIPES[name].__dataclass_fields__:
        batch["task_ids"] = torch.arange(rows) % N_TASKS
    return batch


def step(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and every gradient, on a CPU."""
    model.zero_grad()
    loss = model(**batch).loss
    if loss.requires_grad:  # Arrow's has nothing to train
        loss.backward()
    grads = {n: p.grad.detach().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


def against_cpu(machine: Machine, name: str) -> dict[str, Any]:
    """Return how far loss and gradients are from a CPU's, without what is drawn at random, and a step in 16 bits."""
    rows, length, *size = machine.pick(REAL, (2, 5, 1, 64))
    batch = batch_of(name, rows, length)
    loss, grads = step(model_of(name, *size).eval(), batch)
    there = {key: value.to(machine.device) for key, value in batch.items()}
    model = model_of(name, *size).to(machine.device).eval()
    own_loss, own = step(model, there)
    largest = max((float(g.abs().max()) for g in grads.values()), default=0.0)
    apart = {
        key: float((own[key] - grad).abs().max()) / max(float(grad.abs().max()), 1e-3 * largest, 1e-30)
        for key, grad in grads.items()
    }
    farthest = max(apart, key=apart.__getitem__, default="loss")
    low = model.train().to(machine.low)
    low_loss, low_grads = step(low, there)
    if low_grads:
        torch.optim.AdamW([p for p in low.parameters() if p.requires_grad], 1e-4).step()
    finite = all(bool(g.isfinite().all()) for g in low_grads.values())
    near = apart.get(farthest, 0.0) < NEAR and abs(own_loss - loss) < NEAR * abs(loss) and own.keys() == grads.keys()
    return {
        "holds": near and finite and abs(low_loss - loss) < 0.2 * abs(loss) + 1,
        "loss": [loss, own_loss, low_loss],
        "worst": farthest,
        "error": apart.get(farthest, abs(own_loss - loss)),
        "finite in 16 bits": finite,
    }


def compile_step(name: str, dtype: torch.dtype) -> None:
    """Take a step of a recipe as on a GPU, where launches are only compiled: no value in it means anything."""
    rows, length, *size = REAL
    choose_as_on_a_gpu()

    def zeros(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).zero_()  # what no kernel writes must be finite

    with ExitStack() as stack:
        for owner, function in ((torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, function, zeros(getattr(owner, function))))
        for module in ("engine", "dispatch"):  # triton engines can run here: nothing of them does
            stack.enter_context(mock.patch(f"moa.kernels.{module}.why_not", lambda name: None))
        model = model_of(name, *size).to(dtype)
        for mode in (False, True):
            model.train(mode)
            if mode or dtype == torch.float32:
                step(model, batch_of(name, rows, length))


def rows(machine: Machine) -> Iterator[Row]:
    """Yield a row for each recipe."""
    for name in RECIPES:
        yield Row(f"recipe {name}", partial(against_cpu, machine, name), 1.5, kind="recipe")
