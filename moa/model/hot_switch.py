"""One expert at a time in the base's own weights, switched by writing only what its change touches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..delta import Delta, Dense, Undo
from ..errors import FoldError
from ..folding.weights import check_untied, not_at_hand
from ..layers import as_weight, is_conv1d
from ..mixture.change import check_expert, factor_change, single
from .host import Host


class HotSwitch:
    """Writes one expert of every layer into its weight, and takes it back bit for bit: stored values, no subtraction.

    A sparse expert writes its n entries and stores as many; any other writes and stores a whole weight.

    Args:
        model: whose experts are weight changes (o, i) of dense layers.

    Raises:
        FoldError: a layer without a dense weight, or one that another module uses, too.
    """

    def __init__(self, model: Host) -> None:
        self.mixtures = model.mixtures()
        self._counts = [branch.bank.n_experts for _, branch in model.branches()]
        self._undo: list[Undo] = []
        self._now: int | None = None
        for mixture in self.mixtures.values():
            check_untied(model.base, mixture)
            if mixture.why_not_fold is not None:
                raise FoldError(
                    f"{mixture.name}: a {type(mixture.base).__name__} has no weight to write an expert into."
                )
            if not mixture.is_dense():
                raise FoldError(f"{mixture.name}: {not_at_hand(mixture.base)}")

    def to(self, expert: int | None) -> None:
        """Put an expert's changes (o, i) in place of those that are in the weights now; None leaves the base.

        Raises:
            ConfigError: no such expert; the base is then as it came.
            FoldError: experts that are not weight changes.
        """
        self.restore()
        if expert is not None:
            check_expert(expert, self._counts)
        try:
            for mixture in self.mixtures.values():
                if expert is not None:
                    change = factor_change(mixture, lambda branch: single(branch.bank, expert))
                    weight: Any = mixture.base.weight
                    self._undo.append(_as_stored(mixture.base, change).write_into(weight.data))
        except BaseException:
            self.restore()
            raise
        self._now = expert

    def restore(self) -> None:
        """Write back what was there, in weights of any shape."""
        while self._undo:
            self._undo.pop().restore()
        self._now = None

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Run the base as it came inside the block, weights of any shape; afterwards the same expert is in them."""
        now = self._now
        self.restore()
        try:
            yield
        finally:
            self.to(now)


def _as_stored(base: Any, change: Delta) -> Delta:
    """Return a change (o, i) as the layer stores its weight: transformers' Conv1D has it (i, o)."""
    return Dense(as_weight(base, change.dense()).contiguous()) if is_conv1d(base) else change


@contextlib.contextmanager
def hot_switch(model: Host) -> Iterator[HotSwitch]:
    """Run the base without routers inside the block, and switch experts in its weights; afterwards it is as it came.

    Args:
        model: whose experts are weight changes (o, i) of dense layers.

    Raises:
        FoldError: see `HotSwitch`.

    Source: Bhardwaj et al. 2024, arXiv 2406.13175, §4.2: a sparse adapter is loaded by overwriting its entries.
    Differs: peft adds and subtracts, which leaves rounding errors in the base.
    """
    switch = HotSwitch(model)

    @contextlib.contextmanager
    def inside() -> Iterator[HotSwitch]:
        try:
            yield switch
        finally:
            switch.restore()

    with model._swapped(inside()):
        yield switch
