"""A static mixture in its weight for a while: folded in, and taken back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..mixture import Mixture
from .weights import fold, folded_change


@contextlib.contextmanager
def swapped(mixtures: Mapping[str, Mixture], task_id: int | None = None) -> Iterator[None]:
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
    kept: list[tuple[Any, str, Any]] = []
    try:
        for mixture in mixtures.values():
            names = [name for part in mixture.slices() for name in (part.weight, part.bias)]
            kept += [(mixture.base, name, getattr(mixture.base, name, None)) for name in names]
            fold(mixture, task_id)
        yield
    finally:
        for base, name, value in kept:
            if getattr(base, name, None) is not value:
                setattr(base, name, value)
