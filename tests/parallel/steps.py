"""Two optimizer steps of every recipe on a global batch, in one process or in several: the rows are the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers.loss.loss_utils import LOSS_MAPPING

import moa
from moa.recipes import Recipe
from tests import laws, models

STEPS, MICRO = 2, 2  # optimizer steps, and forwards of each
QUIET: dict[str, Any] = {"jitter": 0.0, "dropout": 0.0, "classifier_dropout": 0.0}
LENGTHS = (8, 6, 7, 5)  # what a process pads its rows to


def case_name(name: str, variant: str) -> str:
    """Return the name of a recipe's variant."""
    return f"{name}-{variant}"


CASES = {case_name(name, variant): (name, variant) for name, variant in laws.RECIPE_CASES}
ONE_EACH = tuple({name: case for case, (name, _) in reversed(CASES.items())}.values())  # a recipe's first variant


def recipe_of(case: str) -> Recipe:
    """Return a recipe that draws nothing which depends on how many rows there are."""
    name, variant = CASES[case]
    kept = {**laws.recipe_options(name, variant), "targets": "all-linear"}
    fields = {field for field in type(laws.small_recipe(name, variant)).__dataclass_fields__}
    quiet = {key: value for key, value in QUIET.items() if key in fields}
    if name == "xlora" and kept.get("depth", 1) == 1:
        quiet.pop("classifier_dropout")
    return moa.make_recipe(name, **{**kept, **quiet})


def base_of(case: str) -> Any:
    """Return a base in fp64: one block, and two where the recipe shares something over all of them."""
    return models.llama(num_hidden_layers=2 if case.startswith("xlora") else 1).double()


def model_of(case: str) -> Any:
    """Return a model in fp64, drawn at random, always the same."""
    return models.randomise(moa.build(base_of(case), recipe_of(case)).double()).train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer with a state, over what is trained."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)


def rows_of(rank: int, number: int) -> dict[str, Tensor]:
    """Return the rows of one process in micro-batch `number`: how many and how long differs from process to process.

    Odd processes have rows of one token: their first layer routes all of them alike, so that other experts get none.
    """
    rng = torch.Generator().manual_seed(100 * number + rank)
    n, length = 2 - rank % 2, LENGTHS[rank]
    ids = torch.randint(2, models.VOCAB, (n, 1 if rank % 2 else length), generator=rng).expand(n, length).clone()
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": labels,
        "task_ids": (torch.arange(n) + rank + number) % laws.N_TASKS,
    }


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the rows of several processes as one batch, padded to the longest."""
    longest = max(part["input_ids"].shape[1] for part in parts)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat(
            [
                F.pad(p[name], (0, longest - p[name].shape[1]), value=fill[name]) if name in fill else p[name]
                for p in parts
            ]
        )
        for name in parts[0]
    }


def n_labels(step: int, world: int) -> Tensor:
    """Return how many labels an optimizer step of all processes has, (), so that shares of them are fp64."""
    batches = [rows_of(rank, step * MICRO + micro) for rank in range(world) for micro in range(MICRO)]
    return torch.tensor(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches), dtype=torch.float64)


def take_step(run: nn.Module, optimizer: Any, step: int, world: int, rank: int | None, by_task: bool) -> None:
    """Take one optimizer step: the whole batch where rank is None, else that process's rows, as Trainer weighs them."""
    n_items = n_labels(step, world)
    for micro in range(MICRO):
        number = step * MICRO + micro
        batch = together([rows_of(r, number) for r in range(world)]) if rank is None else rows_of(rank, number)
        if not by_task:
            batch.pop("task_ids")
        last = micro == MICRO - 1
        waits = isinstance(run, DistributedDataParallel) and not last
        waiting = run.no_sync() if waits else contextlib.nullcontext()  # type: ignore[operator]
        with waiting, losses_as_wide_as_logits():
            loss = run(**batch, num_items_in_batch=n_items).loss
            (loss if rank is None else loss * world).backward()
    optimizer.step()
    optimizer.zero_grad()


@contextlib.contextmanager
def losses_as_wide_as_logits() -> Iterator[None]:
    """Form losses of fp64 logits in fp64: transformers rounds them to fp32, each process's part by itself."""
    kept, narrow = LOSS_MAPPING["ForCausalLM"], Tensor.float

    def wide(self: Tensor) -> Tensor:
        return self if self.dtype == torch.float64 else narrow(self)

    def loss(*args: Any, **kwargs: Any) -> Tensor:
        with mock.patch.object(Tensor, "float", wide):
            return kept(*args, **kwargs)  # type: ignore[no-any-return]

    with mock.patch.dict(LOSS_MAPPING, ForCausalLM=loss):
        yield


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Draw by a table over the experts, and over selections, whatever rows there are."""
    kept = torch.randn_like, torch.rand_like, Tensor.exponential_

    def table(like: Tensor) -> Tensor:
        steps = torch.arange(like.shape[-1], dtype=like.dtype)
        return (steps * 0.37 + 0.21).remainder(1).expand(like.shape)

    def exponential(self: Tensor) -> Tensor:
        selections = torch.arange(self.shape[0], dtype=self.dtype).view(-1, *([1] * (self.ndim - 1)))
        return self.copy_((table(self) + 0.29 * selections).remainder(1) + 0.05)

    torch.randn_like = lambda like, **_: table(like) - 0.5  # type: ignore[assignment]
    torch.rand_like = lambda like, **_: table(like)  # type: ignore[assignment]
    Tensor.exponential_ = exponential  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.randn_like, torch.rand_like, Tensor.exponential_ = kept  # type: ignore[method-assign]


def learned(model: Any) -> dict[str, Tensor]:
    """Return what training moved: trained parameters, and buffers that a checkpoint holds."""
    return {name: value.detach().clone() for name, value in model.adapter_state_dict().items()}


def by_task(case: str) -> bool:
    """Return whether a recipe wants task ids."""
    return laws.needs_tasks(CASES[case][0])
