"""A static mixture in its weight for a while: folded in, and taken back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from ..mixture import Mixture
from .weights import fold, folded_change


class Lifted(Protocol):
    """What holds changes in a base's weights (o, i) for a while and can take them out in between."""

    def lifted(self) -> contextlib.AbstractContextManager[None]:
        """Run with the weights (o, i) as they came inside the block."""


class Swap:
    """Parameters that others stand in for, (o, i) and (o,): as they are, without a copy."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, str, Any]] = []

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Put the old parameters back inside the block, and afterwards again what stands in for them, bit for bit."""
        now = [(base, name, getattr(base, name, None)) for base, name, _ in self.kept]
        _put(self.kept)
        try:
            yield
        finally:
            _put(now)


@contextlib.contextmanager
def swapped(mixtures: Mapping[str, Mixture], task_id: int | None = None) -> Iterator[Swap]:
    """Fold every mixture into its layer inside the block; afterwards the layers are what they were, bit for bit.

    The old parameters are kept and put back, not computed: while the block lasts, the folded layers take twice their
    memory. An error on the way leaves them as they were, too.

    Args:
        mixtures: static ones, each (*rows, i) -> (*rows, o).
        task_id: fold what this task's inputs get.

    Raises:
        FoldError: a mixture has no exact weight; the layer and the reason are named.
    """
    for mixture in mixtures.values():
        folded_change(mixture, task_id)
    swap = Swap()
    try:
        for mixture in mixtures.values():
            names = [name for part in mixture.slices() for name in (part.weight, part.bias)]
            swap.kept += [(mixture.base, name, getattr(mixture.base, name, None)) for name in names]
            fold(mixture, task_id)
        yield swap
    finally:
        _put(swap.kept)


def _put(values: list[tuple[Any, str, Any]]) -> None:
    for base, name, value in values:
        if getattr(base, name, None) is not value:
            setattr(base, name, value)
