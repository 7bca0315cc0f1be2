"""The `concat` engine: every expert in one thin product, and a mask on the rank-sized middle.

Experts of rank r are so thin that running all E of them costs less than sorting rows by expert until E·r is
about 50·k (fp32) to 110·k (bf16) on a CPU. Both factors are stored (E, r, d), so concatenations are views.
Contract: `engine.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bag
from .dtypes import cast, wide
from .engine import Gradients, Operands
from .few_rows import few_rows
from .scale import scale

__all__ = [
    "FEW_ROWS",
    "PLAIN",
    "backward",
    "few_rows",
    "forward",
    "slot_gradients",
    "slot_products",
    "why_not",
]

PLAIN = True
# Up to so many rows a product that accumulates is slower than a product and a sum (measured on a CPU).
FEW_ROWS = 64


def why_not() -> str | None:
    """Return None: it runs wherever PyTorch does."""
    return None


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r): y = Σ_j w_j h_j b[e_j] (+ x baseᵀ + bias), h_j = x a[e_j]ᵀ."""
    x, a, weights, base, bias = operands.x, operands.a, operands.weights, operands.base, operands.bias
    full = x @ a.flatten(0, 1).T  # (T, E·r)
    columns = None if operands.indices is None else slot_columns(operands.indices, a)  # (T, K·r)
    hidden = (full if columns is None else full.gather(1, columns)).view(*weights.shape, a.shape[1])  # (T, K, r)
    mixed, up = scale(hidden, weights).flatten(1), operands.b.flatten(0, 1)  # (T, K·r), (E·r, o)
    if columns is not None and bag.pays(mixed, full.shape[1]):
        y = bag.expand(mixed, columns, up)  # (T, o)
        if bias is not None:
            y += bias
    else:
        mixed = mixed if columns is None else spread(mixed, columns, full.shape[1])  # (T, E·r)
        y = mixed @ up if bias is None else torch.addmm(bias, mixed, up)
    return (y if base is None else add_base(y, x, base)), hidden


def backward(grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of x, a, b, weights, None where `needs` does not ask for one."""
    a, b, weights = operands.a, operands.b, operands.weights
    need_x, need_a, need_b, need_weights = needs
    columns = None if operands.indices is None else slot_columns(operands.indices, a)  # (T, K·r)
    grad_x = grad_a = grad_b = grad_weights = None
    if need_x or need_a or need_weights:
        full = grad @ b.flatten(0, 1).T  # (T, E·r)
        grad_slots = (full if columns is None else full.gather(1, columns)).view(*weights.shape, a.shape[1])
        if need_weights:
            grad_weights = slot_dot(grad_slots, hidden, weights)  # (T, K)
        if need_x or need_a:
            grad_x, grad_a = _gradients(scale(grad_slots, weights), operands.x, a, columns, need_x, need_a)
            if grad_x is not None and operands.base is not None:
                grad_x.addmm_(grad, operands.base)
    if need_b:
        _, grad_b = _gradients(scale(hidden, weights), grad, b, columns, False, True)
    return grad_x, grad_a, grad_b, grad_weights


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), see `SlotEngine`."""
    full = x @ factors.flatten(0, 1).T
    return full.gather(1, slot_columns(indices, factors)).view(*indices.shape, factors.shape[1])


def slot_gradients(
    grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` asks for, see `SlotEngine`."""
    found = _gradients(grad, x, factors, slot_columns(indices, factors), *needs)
    return [value for value in found if value is not None]


def _gradients(
    grad: Tensor, x: Tensor | None, factors: Tensor, columns: Tensor | None, need_x: bool, need_factors: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x (T, d) and factors (E, r, d), from grad (T, K, r) at the columns (T, K·r)."""
    rows, values = factors.flatten(0, 1), grad.flatten(1)  # (E·r, d), (T, K·r)
    if columns is not None and not need_factors and bag.pays(values, len(rows)):
        return bag.expand(values, columns, rows), None
    full = values if columns is None else spread(values, columns, len(rows))  # (T, E·r)
    to_factors = None
    if need_factors:
        assert x is not None
        to_factors = (full.T @ x).view_as(factors)
    return (full @ rows if need_x else None), to_factors


def add_base(y: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """Return y (T, o) plus x baseᵀ, in place."""
    if x.shape[0] <= FEW_ROWS:
        return y.add_(F.linear(x, base))
    return y.addmm_(x, base.T)


def slot_columns(indices: Tensor, factors: Tensor) -> Tensor:
    """Return where the r values of each slot (T, K) lie among those of all experts: columns (T, K·r) of E·r."""
    n_experts, rank, _ = factors.shape
    columns = torch.arange(n_experts * rank, device=indices.device).view(n_experts, rank)
    return torch.embedding(columns, indices).flatten(1)


def spread(values: Tensor, columns: Tensor, n_columns: int) -> Tensor:
    """Return values (T, K·r) at their columns of (T, E·r), 0 elsewhere; repeated experts add."""
    return values.new_zeros(len(values), n_columns).scatter_add_(1, columns, values)


def slot_dot(grad_slots: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """Return ∂/∂weights (T, K): the rank-sized dot product of each slot, summed in fp32 or wider."""
    dtype = wide(hidden.dtype)
    return cast((cast(grad_slots, dtype) * cast(hidden, dtype)).sum(-1), weights.dtype)
