"""One weight for rows of one routing: the sum of the changes, on the base where nothing is lost."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .dtypes import cast


class OneWeight:
    """Σ_e w_e ΔW_e (o, i), on top of the base's weight where all dtypes are one: half precision rounds a change away.

    Args:
        base: W (o, i), or None.
        x: rows (*rows, i).
        d_out: o.
    """

    def __init__(self, base: Tensor | None, x: Tensor, d_out: int) -> None:
        self.base, self.x, self.d_out = base, x, d_out
        self.total: Tensor | None = None
        self.holds_base = False
        self.scale: Tensor | None = None  # of the only change, whose products are scaled in its place

    def add(self, change: Tensor, scale: Tensor) -> None:
        """Add scale · ΔW, of scale (1,) and ΔW (o, i)."""
        if self.total is None and (base := self._base_for(change, scale)) is not None:
            self.total = torch.addcmul(base, change, scale.to(base.dtype))
        elif self.total is None and change.dtype == self.x.dtype == torch.promote_types(change.dtype, scale.dtype):
            self.total, self.scale = change, scale
        elif self.total is None:
            self.total = change * scale
        elif self.scale is not None:
            self.total, self.scale = torch.addcmul(self.total * self.scale, change, scale.to(change.dtype)), None
        else:
            self.total += change * scale

    def opened(self, like: Tensor, scale: Tensor) -> Tensor:
        """Return the weight (o, i) so far, to add changes in place that have the dtype of `like` and a scale (1,)."""
        if self.total is None and (base := self._base_for(like, scale)) is not None:
            self.total = base.clone()
        elif self.total is None:
            dtype = torch.promote_types(like.dtype, scale.dtype)
            self.total = like.new_zeros(self.d_out, self.x.shape[-1], dtype=dtype)
        return self.total

    def _base_for(self, change: Tensor, scale: Tensor) -> Tensor | None:
        """Return the base if it can hold a scaled change, of the scale (1,), without loss."""
        dtype = torch.promote_types(change.dtype, scale.dtype)
        self.holds_base = self.base is not None and self.base.dtype == dtype == change.dtype == self.x.dtype
        return self.base if self.holds_base else None

    def product(self, bias: Tensor | None) -> Tensor:
        """Return x times the transposed weight, plus the bias (o,) of the base, (*rows, o)."""
        x = self.x
        bias = None if bias is None else cast(bias, x.dtype)
        if self.holds_base:
            return F.linear(x, self.total, bias)  # type: ignore[arg-type]
        y = None if self.total is None else self._scaled(F.linear(x, cast(self.total, x.dtype)))
        if self.base is None:
            return x.new_zeros(*x.shape[:-1], self.d_out) if y is None else y
        below = F.linear(x, cast(self.base, x.dtype), bias)
        return below if y is None else y.add_(below)

    def turned(self, grad: Tensor) -> Tensor:
        """Return grad times the weight, (*rows, i) of grad (*rows, o)."""
        if self.holds_base:
            return grad @ self.total  # type: ignore[operator]
        back = None if self.total is None else self._scaled(grad @ cast(self.total, grad.dtype))
        if self.base is None:
            return torch.zeros_like(self.x) if back is None else back
        below = grad @ cast(self.base, grad.dtype)
        return below if back is None else back.add_(below)

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows if self.scale is None else rows.mul_(self.scale)
