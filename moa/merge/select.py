"""The k-th largest magnitude of a whole model, found exactly while its tensors stream by.

For TIES as its paper defines it (arXiv 2306.01708): the trim ranks one flat vector of all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

DIGIT_BITS = 16


def _keys(tensor: Tensor) -> Tensor:
    """Return the magnitudes as integers in the same order: a non-negative IEEE number sorts as its bits."""
    view = torch.int64 if tensor.dtype == torch.float64 else torch.int32
    return tensor.abs().reshape(-1).view(view)


def model_threshold(stream: Callable[[], Iterable[Tensor]], density: float) -> float:
    """Return the k-th largest magnitude over all tensors, k = ⌊density · n⌋ of n entries.

    Radix selection on the bits of |x|, 16 at a time: two passes over the stream for float32, four for float64, in
    65,536 counters, whatever the model's size.

    Args:
        stream: starts a new pass over the same tensors, any shapes, all float32 or all float64.
        density: kept fraction, (0, 1].

    Returns:
        The threshold; `keep_above` with it keeps k entries, and more only where magnitudes are equal to it.
        Infinity if k is 0: nothing is then kept.

    Raises:
        ConfigError: the density is outside (0, 1].
        ShapeError: tensors of both types in one stream.

    Source: Yadav et al. 2023, arXiv 2306.01708, Algorithm 1 line "keep_topk_reset_rest_to_zero".
    Differs: the released code keeps one entry more (it counts from the smallest and includes the boundary).
    """
    if not 0 < density <= 1:
        raise ConfigError(f"model_threshold: density is {density}, expected the kept fraction, in (0, 1].")
    total, kinds = 0, set()
    for tensor in stream():
        total += tensor.numel()
        kinds.add(tensor.dtype)
    if len(kinds) > 1:
        raise ShapeError(f"one threshold over tensors of several types: {sorted(map(str, kinds))}; use one type.")
    k = int(density * total)
    if k == 0:
        return math.inf
    double = torch.float64 in kinds
    bits = 64 if double else 32
    prefix = 0
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        counts = torch.zeros(2**DIGIT_BITS, dtype=torch.int64)
        for tensor in stream():
            keys = _keys(tensor)
            if shift < bits - DIGIT_BITS:
                keys = keys[(keys >> (shift + DIGIT_BITS)) == prefix]
            digits = (keys >> shift) & (2**DIGIT_BITS - 1)
            counts += torch.bincount(digits, minlength=2**DIGIT_BITS).cpu()
        above = counts.flip(0).cumsum(0).flip(0)  # entries whose digit is at least this one
        digit = int((above >= k).nonzero().max())
        k -= int(above[digit + 1]) if digit + 1 < len(above) else 0
        prefix = (prefix << DIGIT_BITS) | digit
    key = torch.tensor([prefix], dtype=torch.int64 if double else torch.int32)
    return float(key.view(torch.float64 if double else torch.float32))
