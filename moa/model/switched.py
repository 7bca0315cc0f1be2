"""Blocks of code in which a model runs without its mixtures, or with them folded into its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..folding.save import check_whole
from ..folding.swap import Lifted, swapped
from ..folding.weights import check_untied
from ..mixture import Mixture
from ..types import Context
from .scope import ModelScope
from .stepping import Stepped
from .whole import Whole, as_they_came


class Switched(Stepped):
    """A model whose base has mixtures inside, and what its forwards start from.

    Attributes:
        base: the model that holds the mixtures.
        scope: gives them the context of the forward that runs.
        whole: modules that are trained whole, and copies of them as they came.
    """

    base: nn.Module
    scope: ModelScope
    whole: list[Whole]
    mixtures: Callable[[], dict[str, Mixture]]
    _folded: Lifted | None = None

    @property
    def context(self) -> Context:
        """The context of the forward that runs in this thread; outside of one, what the next starts from."""
        return self.scope.current()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base as it came inside the block, what is trained whole included; inside `folded`, too."""
        with self._unfolded(), self._set("disable_adapter", "enabled", False):
            if not self.whole:
                yield
                return
            with self.scope.turns.alone(), as_they_came(self.whole):
                yield

    @contextlib.contextmanager
    def _unfolded(self) -> Iterator[None]:
        """Run with the frozen base inside the block where this thread has folded the mixtures into it."""
        folded = self._folded
        if folded is None or not self.scope.turns.mine():
            yield
            return
        with folded.lifted():
            self._folded = None
            try:
                yield
            finally:
                self._folded = folded

    @contextlib.contextmanager
    def _set(self, what: str, name: str, value: Any) -> Iterator[None]:
        self._check_not_folded(what)
        before = getattr(context := self.context, name)
        setattr(context, name, value)
        try:
            yield
        finally:
            setattr(context, name, before)

    def folded(self, task_id: int | None = None) -> contextlib.AbstractContextManager[nn.Module]:
        """Run with the mixtures folded into their layers inside the block, the base bit for bit as it was afterwards.

        Args:
            task_id: fold what this task's inputs get, where routers look at the task.

        Raises:
            FoldError: a mixture has no exact weight; the layer and the reason are named.
            NumericsError: an expert, or a module trained whole, holds NaN or infinity; the tensor is named.
            ConfigError: inside `folded`, where it would be in the weights twice.
        """
        self._check_not_folded("folding")
        mixtures = self.mixtures()
        for mixture in mixtures.values():
            check_untied(self.base, mixture)
        check_whole(self)
        return self._swapped(swapped(mixtures, task_id))

    @contextlib.contextmanager
    def _swapped(self, swap: contextlib.AbstractContextManager[Lifted]) -> Iterator[nn.Module]:
        with self.scope.turns.alone(), swap as folded:
            context, self._folded = self.context, folded
            before, context.enabled = context.enabled, False
            try:
                yield self.base
            finally:
                context.enabled = before
                self._folded = None

    def check_outside(self, what: str) -> None:
        """Check that this thread is in no block that runs on what `what` is about to change.

        Raises:
            ConfigError: inside `folded`, a forward, `pin_expert` or `disable_adapter`.
        """
        self._check_not_folded(what)
        context = self.context
        inside = {
            "a forward": context.batch is not None,
            "pin_expert": context.pinned is not None,
            "disable_adapter": not context.enabled,
        }
        for where in (name for name, here in inside.items() if here):
            raise ConfigError(f"{what} changes what {where} runs on: call it outside.")

    def _check_not_folded(self, what: str) -> None:
        if self._folded is not None and self.scope.turns.mine():  # another thread's fold ends before this one begins
            raise ConfigError(
                f"{what} needs the frozen base, and inside `folded` it holds the mixtures: leave it first."
            )
