"""A frozen linear layer and one LoRA per example, mixed head by head, as one differentiable step.

PyTorch's own chain of small products spends more on bookkeeping than on arithmetic; this one keeps what is rank-sized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def headed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, mix: Tensor, scale: float
) -> Tensor:
    """Return x W^T + b + s · (x A_b^T) U_b for every example b, (B, S, o), differentiable once.

    A_b = concat_h Σ_e w_{b,h,e} A_{e,h} and U_b likewise; see `HeadedLoRABank`.

    Args:
        x: (B, S, i).
        weight: (o, i) frozen, of x's dtype.
        bias: (o,) frozen, or None.
        down: (E, r, i).
        up: (E, r, o).
        mix: (B, H, E) w, of down's dtype.
        scale: s.
    """
    out: Tensor = _HeadedLinear.apply(x, weight, bias, down, up, mix, scale)
    return out


class _HeadedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, mix: Tensor, scale: float
    ) -> Tensor:
        heads, rank = mix.shape[1], down.shape[1]
        per_head = mix.transpose(0, 1)
        own_down, own_up = (_heads_last(per_head @ _heads_first(f, heads), rank).to(x.dtype) for f in (down, up))
        hidden = torch.bmm(x, own_down.mT)
        y = F.linear(x, weight, bias)
        y.baddbmm_(hidden, own_up, alpha=scale)
        ctx.save_for_backward(x, weight, down, up, mix, own_down, own_up, hidden)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, mix, own_down, own_up, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad
        heads, rank = mix.shape[1], down.shape[1]
        grad_hidden = torch.bmm(grad, own_up.mT).mul_(ctx.scale)
        dx = None
        if needs[0]:
            dx = grad @ weight
            dx.baddbmm_(grad_hidden, own_down)
        if not any(needs[3:6]):
            return dx, None, None, None, None, None, None
        # what reaches the mixed factors of each example, head by head
        to_down = _heads_first(torch.bmm(grad_hidden.mT, x).to(down.dtype), heads)
        to_up = _heads_first(torch.bmm(hidden.mT, grad).mul_(ctx.scale).to(up.dtype), heads)
        turned = mix.permute(1, 2, 0)
        d_down = _heads_last(turned @ to_down, rank) if needs[3] else None
        d_up = _heads_last(turned @ to_up, rank) if needs[4] else None
        d_mix = None
        if needs[5]:
            d_mix = to_down @ _heads_first(down, heads).mT
            d_mix = d_mix.baddbmm_(to_up, _heads_first(up, heads).mT).transpose(0, 1)
        return dx, None, None, d_down, d_up, d_mix, None


def _heads_first(factors: Tensor, heads: int) -> Tensor:
    """Return factors (N, r, H d) as (H, N, r d)."""
    n, rank, features = factors.shape
    return (
        factors.view(n, rank, heads, features // heads).permute(2, 0, 1, 3).reshape(heads, n, rank * features // heads)
    )


def _heads_last(factors: Tensor, rank: int) -> Tensor:
    """Return factors (H, N, r d) as (N, r, H d)."""
    heads, n, size = factors.shape  # no -1 below: with no examples it would be any size
    return factors.view(heads, n, rank, size // rank).permute(1, 2, 0, 3).reshape(n, rank, heads * size // rank)
