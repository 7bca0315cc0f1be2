"""Low-rank mixtures over any grouped product: what the engines `grouped_mm` and `megablocks` share.

Rows are copied in the order of their experts, each expert multiplies its span, and slots are added back per row: the
usual way to run fat experts. For thin ones the copies dominate; these engines are for comparison and for
installations that have a tuned grouped product.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .concat import scale, slot_dot
from .plan import Plan, sort_slots


class GroupedProduct(Protocol):
    """A product over rows grouped by expert. offsets (E + 1,) int64 as in `Plan`."""

    def rows(self, values: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
        """Return values[g] factors[g] (N, q) of grouped values (N, p) and factors (E, p, q)."""

    def gram(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        """Return left[g]ᵀ right[g] (E, p, q) of grouped left (N, p) and right (N, q)."""


def grouped_forward(
    product: GroupedProduct,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    indices = _all_experts(indices, weights)
    plan = sort_slots(indices, a.shape[0])
    rank = a.shape[1]
    hidden_sorted = product.rows(x.index_select(0, plan.rows), a.transpose(1, 2), plan.offsets)
    hidden = hidden_sorted.index_select(0, plan.place).view(*indices.shape, rank)
    y = _add_slots(product.rows(_sorted(scale(hidden, weights), plan), b, plan.offsets), plan, indices)
    if bias is not None:
        y = y + bias
    if base is not None:
        y.addmm_(x, base.T)
    return y, hidden


def grouped_backward(
    product: GroupedProduct,
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor | None,
    base: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, a, b, weights that `needs` names, in this order."""
    indices = _all_experts(indices, weights)
    plan = sort_slots(indices, a.shape[0])
    need_x, need_a, need_b, need_weights = needs
    rows = grad.index_select(0, plan.rows)
    found: list[Tensor] = []
    grad_weights = None
    if need_x or need_a or need_weights:
        sorted_slots = product.rows(rows, b.transpose(1, 2), plan.offsets)
        grad_slots = sorted_slots.index_select(0, plan.place).view(*indices.shape, a.shape[1])
        if need_weights:
            assert hidden is not None
            grad_weights = slot_dot(grad_slots, hidden, weights)
        grad_hidden = _sorted(scale(grad_slots, weights), plan)
        if need_x:
            grad_x = _add_slots(product.rows(grad_hidden, a, plan.offsets), plan, indices)
            found.append(grad_x if base is None else grad_x.addmm_(grad, base))
        if need_a:
            assert x is not None
            found.append(product.gram(grad_hidden, x.index_select(0, plan.rows), plan.offsets))
    if need_b:
        assert hidden is not None
        found.append(product.gram(_sorted(scale(hidden, weights), plan), rows, plan.offsets))
    if grad_weights is not None:
        found.append(grad_weights)
    return found


def _all_experts(indices: Tensor | None, weights: Tensor) -> Tensor:
    if indices is not None:
        return indices
    return torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)


def _sorted(values: Tensor, plan: Plan) -> Tensor:
    """Return slot values (T, K, r) in the order of their experts (T·K, r)."""
    return values.reshape(-1, values.shape[-1]).index_select(0, plan.order)


def _add_slots(parts: Tensor, plan: Plan, indices: Tensor) -> Tensor:
    """Return the sum over each row's slots (T, d) of sorted parts (T·K, d)."""
    return parts.index_select(0, plan.place).view(*indices.shape, parts.shape[-1]).sum(1)
