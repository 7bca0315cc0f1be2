"""Routers' own updates, once per optimizer step.

A hook on all optimizers is the one place that sees real steps only: not micro-batches, not skipped fp16 steps, not the
second forward of gradient checkpointing; and it works in any loop. An optimizer that holds a model's parameters has
stepped for it. One that holds none of them may hold copies or partitions of them, as mixed precision and sharded
engines do, and writes them back afterwards: whether it did is seen when the model is next used.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Stepped(nn.Module):
    """A model whose routers want to know of optimizer steps.

    Attributes:
        steps_done: optimizer steps since it was built, or of the run that it goes on with where a monitor knows them.
    """

    steps_done: int = 0

    _counted: bool = False  # a training forward since the last step
    _held: bool = False  # an optimizer holds its parameters themselves
    _before: Tensor | None = None  # what its parameters summed up to when another optimizer stepped

    def optimizer_step_done(self) -> None:
        """Let every router take its step; called after each step of an optimizer that trains this model."""
        self._counted, self._before = False, None
        self.steps_done += 1

    def settle(self) -> None:
        """Take the step of an optimizer that holds copies of the parameters, if these have moved since."""
        if self._before is not None and not torch.compiler.is_compiling():
            before, self._before = self._before, None
            if not torch.equal(before, self._sums()):
                self.optimizer_step_done()

    def _another_stepped(self) -> None:
        """Note the parameters as they are: an optimizer has stepped that holds none of them."""
        if self._counted and not self._held and self._before is None:
            self._before = self._sums()
            self.exchange_counts()  # here, where every process is: one may save before the next forward

    def exchange_counts(self) -> None:
        """Let routers add up over the processes what they have counted; called in all of them."""

    def _sums(self) -> Tensor:
        """Return one number of each trainable parameter, (P,); none of a model that was unloaded."""
        held = (getattr(p, "ds_tensor", p) for p in self.parameters() if p.requires_grad)  # ZeRO-3: this process's part
        sums = [p.detach().double().sum().cpu() for p in held]
        return torch.stack(sums) if sums else torch.zeros(0)


_models: weakref.WeakSet[Stepped] = weakref.WeakSet()


def watch(model: Stepped) -> None:
    """Call `model.optimizer_step_done()` after each step of an optimizer that trains its parameters, of any shape."""
    _models.add(model)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    held: set[int] = set()
    for model in list(_models):
        held = held or {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(p) in held for p in model.parameters() if p.requires_grad):
            model._held = True
            model.exchange_counts()
            model.optimizer_step_done()
        else:
            model._another_stepped()


register_optimizer_step_post_hook(_after_step)
