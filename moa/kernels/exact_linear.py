"""A router's logits in fp32, whatever the rows' dtype, without a kept fp32 copy of the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _ExactLinear(torch.autograd.Function):
    """x W^T in fp32 whatever x's dtype or autocast, keeping x itself for backward and no fp32 copy of it.

    With a frozen weight not even x is kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else x.new_empty(0), weight)
        ctx.x_dtype = x.dtype
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        dx = dw = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (grad @ weight.to(grad.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                rows = grad.flatten(0, -2) if grad.ndim > 1 else grad[None]
                dw = (rows.T @ x.reshape(rows.shape[0], -1).to(grad.dtype)).to(weight.dtype)
        return dx, dw


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T (*rows, E) in fp32 (fp64 for fp64 x): near-ties must not flip with the activation dtype.

    Args:
        x: (*rows, i), any float dtype.
        weight: (E, i).
    """
    if x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64):
        if not torch.is_autocast_enabled(x.device.type):  # no cast, so no copy to avoid
            return F.linear(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, weight)
    out: Tensor = _ExactLinear.apply(x, weight)
    return out
