"""An engine as another package would write one: each slot by its own expert's factors. Used by `test_engine.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.kernels import Operands

calls: list[str] = []
scale = 1.0  # anything else is wrong


def why_not() -> str | None:
    """Return None: it runs wherever PyTorch does."""
    return None


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r)."""
    calls.append("forward")
    indices = experts(operands)
    hidden = torch.einsum("ti,tkri->tkr", operands.x, operands.a[indices])
    y = torch.einsum("tkr,tk,tkro->to", hidden, operands.weights, operands.b[indices]) * scale
    return (y if operands.base is None else y + F.linear(operands.x, operands.base, operands.bias)), hidden


def backward(
    grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, a, b, weights."""
    calls.append("backward")
    indices, weights, x = experts(operands), operands.weights, operands.x
    chosen = F.one_hot(indices, len(operands.a)).to(grad.dtype)  # (T, K, E)
    slots = torch.einsum("to,tkro->tkr", grad, operands.b[indices])
    grad_x = grad_a = grad_b = grad_weights = None
    if needs[0]:
        grad_x = torch.einsum("tkr,tk,tkri->ti", slots, weights, operands.a[indices])
        grad_x = grad_x if operands.base is None else grad_x + grad @ operands.base
    if needs[1]:
        grad_a = torch.einsum("tkr,tk,ti,tke->eri", slots, weights, x, chosen)
    if needs[2]:
        grad_b = torch.einsum("tkr,tk,to,tke->ero", hidden, weights, grad, chosen)
    if needs[3]:
        grad_weights = (slots * hidden).sum(-1)
    return grad_x, grad_a, grad_b, grad_weights


def experts(operands: Operands) -> Tensor:
    """Return the indices (T, K), where all experts are meant as well."""
    every = torch.arange(operands.weights.shape[1]).expand(operands.weights.shape)
    return every if operands.indices is None else operands.indices
