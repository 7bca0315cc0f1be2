"""Weights as integers of one scale a row: the layer, the scales, and the rounding that lets gradients pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class IntegerLinear(nn.Module):
    """y = x (s · codes)^T + b, a frozen linear layer of integers.

    Args:
        codes: (o, i) int8.
        scale: (o, 1).
        bias: (o,) or None.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias if bias is None else bias.detach())

    def dequantize(self) -> Tensor:
        """Return s · codes, (o, i)."""
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (*rows, o) for x (*rows, i)."""
        bias: Any = self.bias
        return F.linear(x, self.dequantize().to(x.dtype), bias)


def row_scales(weight: Tensor, bits: int) -> Tensor:
    """Return one scale a row, (o, 1), of a weight (o, i): that of the integers it holds already, else max |w| / top.

    Args:
        weight: dense, or what a library's integers of one scale a row mean.
        bits: of a code, symmetric: from -top to top, top = 2^(bits - 1) - 1.
    """
    top = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(1, keepdim=True)  # (o, 1)
    scale = torch.where(largest > 0, largest / top, 1)
    found = torch.zeros_like(largest, dtype=torch.bool)
    for most in range(top, 0, -1):  # the largest integer that the row holds
        codes = weight * (most / largest.clamp(min=torch.finfo(weight.dtype).tiny))
        whole = ((codes - codes.round()).abs() < 1e-3).all(1, keepdim=True) & (largest > 0) & ~found
        scale = torch.where(whole, largest / most, scale)
        found |= whole
    return scale


class Grid(nn.Module):
    """The scales of one weight's rows, (o, 1), while they are learned, and afterwards.

    Args:
        scale: where they start.
        bits: of a code.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(scale.detach().clone())

    def settle(self, scale: Tensor | None = None) -> None:
        """Learn no longer: keep the scales (o, 1) as they are, or as given, and out of checkpoints of the experts."""
        kept = (self.scale if scale is None else scale).detach().to(self.scale)
        del self.scale
        self.register_buffer("scale", kept, persistent=False)


def codes_of(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """Return the integers of a weight (o, i) under scales (o, 1), from -top to top, in its own dtype."""
    return (weight / scale).round().clamp(-top, top)


class Rounded(torch.autograd.Function):
    """s · clamp(round(W / s)) of W (o, i), s (o, 1).

    The gradient of W is 1 where nothing is clipped and 0 elsewhere; that of s is round(W / s) - W / s where nothing is
    clipped, and ±top elsewhere, as the rounding passes gradients as if it were not there.

    Source: Esser et al. 2019, arXiv 1902.08153, eq. 3.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, top: int) -> Tensor:
        """Return the rounded weight (o, i)."""
        codes = codes_of(weight, scale, top)
        ctx.save_for_backward(weight, scale, codes)
        ctx.top = top
        return codes * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of W (o, i) and of s (o, 1)."""
        weight, scale, codes = ctx.saved_tensors
        inside = (weight / scale).abs() <= ctx.top * (1 + 1e-6)
        of_weight = torch.where(inside, grad, 0) if ctx.needs_input_grad[0] else None
        of_scale = None
        if ctx.needs_input_grad[1]:
            of_scale = (grad * torch.where(inside, codes - weight / scale, codes)).sum(1, keepdim=True)
        return of_weight, of_scale, None
