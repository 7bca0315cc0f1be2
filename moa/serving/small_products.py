"""Many small products in a decoding step on a CPU, where a call costs more than the product, and NumPy's cost less.

Thirty adapters of a few rows each are sixty products a layer; a call of torch's takes three times as long as one of
NumPy's, which sees the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..delta import Delta, LowRank

Factors = tuple[Any, Any]  # down (i, r) and up (r, o), as arrays on the tensors' memory
MOST_ROWS = 8  # of an adapter; beyond, the product costs more than the call


def factors_of(change: Delta) -> Factors | None:
    """Return a low-rank change (o, i) of fp32 on a CPU as arrays (i, r) and (r, o), without a copy; None of another."""
    if not isinstance(change, LowRank) or change.down.device.type != "cpu" or change.down.dtype != torch.float32:
        return None
    return change.down.T.numpy(), change.up.T.numpy()


def add_small(y: Tensor, x: Tensor, order: Any, counts: Sequence[int], factors: Sequence[Factors | None]) -> None:
    """Add Σ (x down) up to the rows of y in place.

    Args:
        y: (T, o), fp32 on a CPU, contiguous.
        x: (T, i).
        order: (n,) array: rows that have an adapter, those of one side by side; None where they are in order.
        counts: rows of each adapter.
        factors: of each adapter; None of one that does not have this layer.
    """
    target, rows = y.numpy(), x.numpy()
    seen = rows if order is None else rows[order]  # (n, i)
    added = np.empty((len(seen), target.shape[1]), np.float32)
    at = 0
    for count, pair in zip(counts, factors, strict=True):
        if pair is None:
            added[at : at + count] = 0
        else:
            np.matmul(seen[at : at + count] @ pair[0], pair[1], out=added[at : at + count])
        at += count
    if order is None:
        target += added
    else:
        target[order] += added  # each row once
