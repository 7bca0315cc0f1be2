"""A frozen basis under trained scales: formed in two passes, and nothing of its size is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled_basis(inner: Tensor, basis: Tensor, outer: Tensor, scaling: float) -> Tensor:
    """Return s · inner[r, n] basis[r, d] outer[n, d], (r N, d), whose gradient goes to inner and outer.

    Args:
        inner: (r, N).
        basis: (r, 1, d), frozen.
        outer: (N, d).
        scaling: s.
    """
    return _ScaledBasis.apply(inner, basis, outer, scaling)  # type: ignore[no-any-return, no-untyped-call]


class _ScaledBasis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inner: Tensor, basis: Tensor, outer: Tensor, scaling: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(inner, basis, outer)
        ctx.scaling = scaling
        return torch.mul(basis, outer).mul_((inner * scaling).unsqueeze(-1)).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inner, basis, outer = ctx.saved_tensors
        to_inner = to_outer = None
        through = grad.view(*inner.shape, grad.shape[-1]) * basis  # (r, N, d)
        if ctx.needs_input_grad[2]:
            to_outer = (through * (inner * ctx.scaling).unsqueeze(-1)).sum(0)
        if ctx.needs_input_grad[0]:
            to_inner = through.mul_(outer).sum(-1) * ctx.scaling
        return to_inner, None, to_outer, None
