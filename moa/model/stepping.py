"""Routers' own updates, once per optimizer step.

A hook on the optimizer is the one place that sees real steps alone: not micro-batches, not skipped fp16 steps, not
the second forward of gradient checkpointing; and it works in any loop.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Stepped(Protocol):
    """A model whose routers want to know of optimizer steps."""

    def parameters(self) -> Any:
        """Yield the parameters, of any shape, e.g. (E, r, i)."""

    def optimizer_step_done(self) -> None:
        """Let every router take its step."""


_models: weakref.WeakSet[Any] = weakref.WeakSet()


def watch(model: Stepped) -> None:
    """Call `model.optimizer_step_done()` after each step of an optimizer that holds one of its parameters."""
    _models.add(model)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held: set[int] = set()
    for model in list(_models):
        held = held or {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in model.parameters() if p.requires_grad):
            model.optimizer_step_done()


register_optimizer_step_post_hook(_after_step)
