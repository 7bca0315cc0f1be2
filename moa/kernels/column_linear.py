"""A linear layer of whose weight a few columns are trained: one product forward, and r inputs kept for the backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def column_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor, columns: Tensor, scaling: float = 1.0
) -> Tensor:
    """Return x W^T + b, (*rows, o), whose gradient goes to x and to what is added to W's columns.

    Args:
        x: (*rows, i).
        weight: W (o, i), with s · up^T in its columns already.
        bias: b (o,) or None, frozen.
        up: (r, o), times s what was added; it gets s · x_S^T dY.
        columns: S, (r,) int64.
        scaling: s.

    Source: Woo et al. 2025 (PaCA), arXiv 2503.01905, eq. 5-6.
    """
    return _ColumnLinear.apply(x, up, weight, bias, columns, scaling)  # type: ignore[no-any-return, no-untyped-call]


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor, scaling: float
    ) -> Tensor:
        kept = x.index_select(-1, columns) if ctx.needs_input_grad[1] else None  # (*rows, r)
        ctx.save_for_backward(kept, weight, up)
        ctx.scaling, ctx.dtype = scaling, x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        kept, weight, up = ctx.saved_tensors
        to_x = (grad.to(weight.dtype) @ weight).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        to_up = None
        if kept is not None:
            rows, out = kept.reshape(-1, kept.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (T, r), (T, o)
            to_up = (rows.to(out.dtype).T @ out).to(up.dtype) * ctx.scaling
        return to_x, to_up, None, None, None, None
