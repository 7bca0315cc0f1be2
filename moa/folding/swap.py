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
    kept: list[tuple[Any, Any, Any]] = []
    try:
        for mixture in mixtures.values():
            base: Any = mixture.base
            kept.append((base, base.weight, getattr(base, "bias", None)))
            fold(mixture, task_id)
        yield
    finally:
        for base, weight, bias in kept:
            base.weight = weight
            if getattr(base, "bias", None) is not bias:
                base.bias = bias
