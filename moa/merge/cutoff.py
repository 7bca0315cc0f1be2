"""The k-th largest magnitude of a whole model, found exactly while its tensors stream by.

For TIES as its paper defines it (arXiv 2306.01708): the trim ranks one flat vector of all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, ShapeError

DIGIT_BITS = 16


def _keys(tensor: Tensor, dtype: torch.dtype) -> NDArray[np.signedinteger]:
    """Return the magnitudes (n,) as integers in the same order: a non-negative IEEE number sorts as its bits."""
    if tensor.dtype != dtype:
        raise ShapeError(
            f"one threshold over tensors of two types, {dtype} and {tensor.dtype}: convert the adapter to one type, or "
            "rank each tensor by itself (scope='tensor')."
        )
    view = torch.int64 if dtype == torch.float64 else torch.int32
    # numpy's counting and selecting is two to five times as fast as torch's on CPU.
    return tensor.abs().reshape(-1).view(view).cpu().numpy()


def model_threshold(
    stream: Callable[[], Iterable[Tensor]], n: int, density: float, dtype: torch.dtype = torch.float32
) -> float:
    """Return the k-th largest magnitude over all tensors, k = ⌊density · n⌋ of n entries.

    Radix selection on the bits of |x|, 16 at a time: two passes over the stream for float32, four for float64, in
    65,536 counters, whatever the model's size.

    Args:
        stream: starts a new pass over the same tensors, of any shapes.
        n: number of entries in a pass.
        density: kept fraction, (0, 1].
        dtype: float32 or float64, the type of every tensor.

    Returns:
        The threshold; `keep_above` with it keeps k entries, and more only where magnitudes are equal to it.
        Infinity if k is 0: nothing is then kept.

    Raises:
        ConfigError: the density is outside (0, 1], or the stream does not hold n entries.
        ShapeError: a tensor of another type.

    Source: Yadav et al. 2023, arXiv 2306.01708, Algorithm 1 (trim).
    Differs: the released code keeps one entry more (it counts from the smallest and includes the boundary).
    """
    if not 0 < density <= 1:
        raise ConfigError(f"model_threshold: density is {density}, expected the kept fraction, in (0, 1].")
    k = int(density * n)
    if k == 0:
        return math.inf
    bits = dtype.itemsize * 8
    prefix = 0
    for shift in range(bits - DIGIT_BITS, -1, -DIGIT_BITS):
        counts = np.zeros(2**DIGIT_BITS, dtype=np.int64)
        first, last = prefix << (shift + DIGIT_BITS), ((prefix + 1) << (shift + DIGIT_BITS)) - 1
        for tensor in stream():
            keys = _keys(tensor, dtype)
            if shift < bits - DIGIT_BITS:
                keys = keys[np.flatnonzero((keys >= first) & (keys <= last))] - first
            counts += np.bincount(keys >> shift, minlength=2**DIGIT_BITS)
        if shift == bits - DIGIT_BITS and int(counts.sum()) != n:
            raise ConfigError(f"model_threshold: the stream holds {int(counts.sum())} entries, {n} were announced.")
        above = counts[::-1].cumsum()[::-1]  # entries whose digit is at least this one
        digit = int(np.flatnonzero(above >= k).max())
        k -= int(above[digit] - counts[digit])
        prefix = (prefix << DIGIT_BITS) | digit
    key = np.array([prefix], dtype=np.int64 if dtype == torch.float64 else np.int32)
    return float(key.view(np.float64 if dtype == torch.float64 else np.float32)[0])
