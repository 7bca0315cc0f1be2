"""The dtypes that products run in.

`Tensor.to` costs microseconds even when it is a no-op, so these helpers test the dtype first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def exact_dtypes(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which engines keep the dtypes they were given: autocast stays on inside custom ops."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return value, of any shape, in a dtype: itself where it has it."""
    return value if value.dtype == dtype else value.to(dtype)


def cast_all(dtype: torch.dtype, *values: Tensor | None) -> list[Any]:
    """Return the values in one dtype: inside the op, so that the masters are kept for backward, not their copies."""
    return [value if value is None or value.dtype == dtype else value.to(dtype) for value in values]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums and routers' logits are formed in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
