"""Low-rank mixtures over any grouped product: what the engines `grouped_mm` and `megablocks` share.

Rows are copied in the order of their experts, each expert multiplies its span, and slots are added back per row: the
usual way to run fat experts. For thin ones the copies dominate; these engines are for comparison and for
installations that have a tuned grouped product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .concat import slot_dot
from .engine import Gradients, Operands
from .plan import Plan, sort_slots, sort_values, unsort_values
from .scale import scale


class GroupedProduct(Protocol):
    """A product over rows grouped by expert. offsets (E + 1,) int64 as in `Plan`."""

    def rows(self, values: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
        """Return values[g] factors[g] (N, q) of grouped values (N, p) and factors (E, p, q)."""

    def gram(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """Return left[g]ᵀ right[g] (E, p, q) of grouped left (N, p) and right (N, q)."""


def grouped_forward(product: GroupedProduct, operands: Operands) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    x, a, b, weights = operands.x, operands.a, operands.b, operands.weights
    indices = _all_experts(operands.indices, weights)
    plan = sort_slots(indices, a.shape[0])
    hidden_sorted = product.rows(x.index_select(0, plan.rows), a.transpose(1, 2), plan.offsets)  # (T·K, r)
    hidden = unsort_values(hidden_sorted, plan, indices)  # (T, K, r)
    y = _add_slots(product.rows(sort_values(scale(hidden, weights), plan), b, plan.offsets), plan, indices)
    if operands.bias is not None:
        y = y + operands.bias
    if operands.base is not None:
        y.addmm_(x, operands.base.T)
    return y, hidden


def grouped_backward(
    product: GroupedProduct, grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]
) -> Gradients:
    """Return the gradients of x, a, b, weights, None where `needs` does not ask for one."""
    a, b, weights = operands.a, operands.b, operands.weights
    indices = _all_experts(operands.indices, weights)
    plan = sort_slots(indices, a.shape[0])
    need_x, need_a, need_b, need_weights = needs
    rows = grad.index_select(0, plan.rows)  # (T·K, o)
    grad_x = grad_a = grad_b = grad_weights = None
    if need_x or need_a or need_weights:
        sorted_slots = product.rows(rows, b.transpose(1, 2), plan.offsets)
        grad_slots = unsort_values(sorted_slots, plan, indices)  # (T, K, r)
        if need_weights:
            grad_weights = slot_dot(grad_slots, hidden, weights)
        grad_hidden = sort_values(scale(grad_slots, weights), plan)  # (T·K, r)
        if need_x:
            grad_x = _add_slots(product.rows(grad_hidden, a, plan.offsets), plan, indices)
            if operands.base is not None:
                grad_x.addmm_(grad, operands.base)
        if need_a:
            grad_a = product.gram(grad_hidden, operands.x.index_select(0, plan.rows), plan.offsets)
    if need_b:
        grad_b = product.gram(sort_values(scale(hidden, weights), plan), rows, plan.offsets)
    return grad_x, grad_a, grad_b, grad_weights


def _all_experts(indices: Tensor | None, weights: Tensor) -> Tensor:
    if indices is not None:
        return indices
    return torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)


def _add_slots(parts: Tensor, plan: Plan, indices: Tensor) -> Tensor:
    """Return the sum over each row's slots (T, d) of sorted parts (T·K, d)."""
    return unsort_values(parts, plan, indices).sum(1)
