"""The `grouped_mm` engine: torch's own grouped_mm as the grouped product, for comparison. See `grouped.py`."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import BackendError
from .grouped import grouped_backward, grouped_forward


class TorchProduct:
    """`GroupedProduct` by torch's grouped_mm: 16- and 32-bit dtypes, widths of multiples of 16 bytes."""

    def rows(self, values: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
        """Return values[g] factors[g] (N, q)."""
        self._check(values, factors)
        if not values.shape[0]:
            return values.new_zeros(0, factors.shape[-1])
        return F.grouped_mm(values, factors, offs=offsets[1:].int())

    def gram(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """Return left[g]ᵀ right[g] (E, p, q)."""
        self._check(left, right)
        n_experts = offsets.numel() - 1
        if not left.shape[0]:
            return left.new_zeros(n_experts, left.shape[1], right.shape[1])
        out = F.grouped_mm(left.t(), right, offs=offsets[1:].int())
        # Some releases leave the products of empty groups unwritten on some devices.
        empty = offsets.diff() == 0
        return out.masked_fill(empty[:, None, None], 0)

    @staticmethod
    def _check(*operands: Tensor) -> None:
        for value in operands:
            if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise BackendError(f"grouped_mm does not run in {value.dtype}: use engine 'concat' or 'sorted'.")
            for width in value.shape[-2:] if value.ndim == 3 else value.shape[-1:]:
                if width * value.itemsize % 16:
                    raise BackendError(
                        f"grouped_mm needs widths of multiples of 16 bytes, got {width} elements of {value.dtype}: "
                        "change the rank, or use engine 'concat' or 'sorted'."
                    )


def why_not() -> str | None:
    """Return why the engine cannot run here, or None if it can."""
    if hasattr(F, "grouped_mm"):
        return None
    return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm: install a later torch."


forward = partial(grouped_forward, TorchProduct())
backward = partial(grouped_backward, TorchProduct())
