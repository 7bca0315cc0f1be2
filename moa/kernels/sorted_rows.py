"""The `sorted` engine: rows gathered in the order of their experts, one product each. For large E·r on a CPU.

It reads no expert that no row chose. Contract: `engine.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import concat
from .concat import add_base, slot_dot, why_not
from .engine import Gradients, Operands
from .plan import Plan, sort_slots, sort_values, unsort_values
from .scale import scale

__all__ = ["PLAIN", "backward", "forward", "slot_gradients", "slot_products", "why_not"]

PLAIN = True
Spans = list[tuple[int, int, int]]
_BLOCK_ELEMENTS = 1 << 20
_MIN_COLUMNS = 256


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    x, a, weights, indices = operands.x, operands.a, operands.weights, operands.indices
    if indices is None:  # every row has every expert: there is nothing to sort
        return concat.forward(operands)
    plan, spans = _plan(indices, a.shape[0])
    hidden = _shrink(x, a, indices, plan, spans)  # (T, K, r)
    y = _expand(sort_values(scale(hidden, weights), plan), operands.b, plan, spans, indices.shape)
    if operands.bias is not None:
        y += operands.bias
    return (y if operands.base is None else add_base(y, x, operands.base)), hidden


def backward(grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of x, a, b, weights, None where `needs` does not ask for one."""
    a, b, weights, indices = operands.a, operands.b, operands.weights, operands.indices
    if indices is None:
        return concat.backward(grad, operands, hidden, needs)
    plan, spans = _plan(indices, a.shape[0])
    need_x, need_a, need_b, need_weights = needs
    through = need_x or need_a or need_weights
    grad_x = grad_a = grad_weights = None
    grad_b = torch.zeros_like(b) if need_b else None
    mixed = sort_values(scale(hidden, weights), plan) if need_b else None  # (T·K, r)
    slots = grad.new_empty(indices.numel(), a.shape[1])  # (T·K, r)
    for expert, start, stop in spans:
        rows = grad.index_select(0, plan.rows[start:stop])  # gathered once for both products
        if through:
            torch.mm(rows, b[expert].T, out=slots[start:stop])
        if grad_b is not None and mixed is not None:
            torch.mm(mixed[start:stop].T, rows, out=grad_b[expert])
    if through:
        grad_slots = unsort_values(slots, plan, indices)  # (T, K, r)
        if need_weights:
            grad_weights = slot_dot(grad_slots, hidden, weights)
        if need_x or need_a:
            grad_hidden = sort_values(scale(grad_slots, weights), plan)  # (T·K, r)
            if need_x:
                grad_x = _expand(grad_hidden, a, plan, spans, indices.shape)
                if operands.base is not None:
                    grad_x.addmm_(grad, operands.base)
            if need_a:
                grad_a = _gram(grad_hidden, operands.x, a, plan, spans)
    return grad_x, grad_a, grad_b, grad_weights


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), see `SlotEngine`."""
    return _shrink(x, factors, indices, *_plan(indices, factors.shape[0]))


def slot_gradients(
    grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` asks for, see `SlotEngine`."""
    plan, spans = _plan(indices, factors.shape[0])
    values = sort_values(grad, plan)
    found: list[Tensor] = []
    if needs[0]:
        found.append(_expand(values, factors, plan, spans, indices.shape))
    if needs[1]:
        assert x is not None
        found.append(_gram(values, x, factors, plan, spans))
    return found


def _plan(indices: Tensor, n_experts: int) -> tuple[Plan, Spans]:
    """Return the plan and (expert, start, stop) of every expert that some row chose."""
    plan = sort_slots(indices, n_experts)
    edges = plan.offsets.tolist()
    spans = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(edges)) if stop > start]
    return plan, spans


def _shrink(x: Tensor, factors: Tensor, indices: Tensor, plan: Plan, spans: Spans) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot (T, K, r) of x (T, d) and factors (E, r, d)."""
    parts = x.new_empty(indices.numel(), factors.shape[1])
    for expert, start, stop in spans:
        torch.mm(x.index_select(0, plan.rows[start:stop]), factors[expert].T, out=parts[start:stop])
    return unsort_values(parts, plan, indices)


def _gram(values: Tensor, x: Tensor, factors: Tensor, plan: Plan, spans: Spans) -> Tensor:
    """Return Σ of values (T·K, r), sorted, times their rows of x (T, d), for each expert of factors: (E, r, d)."""
    gram = torch.zeros_like(factors)
    for expert, start, stop in spans:
        torch.mm(values[start:stop].T, x.index_select(0, plan.rows[start:stop]), out=gram[expert])
    return gram


def _expand(values: Tensor, factors: Tensor, plan: Plan, spans: Spans, slots: torch.Size) -> Tensor:
    """Return Σ_j values_j factors[e_j] (T, d) of sorted values (T·K, r) and factors (E, r, d)."""
    n_rows, k = slots
    d = factors.shape[-1]
    # Blocks of columns keep the products in cache: fresh pages for all of (T·K, d) cost more than the sums.
    width = min(d, max(_MIN_COLUMNS, _BLOCK_ELEMENTS // max(1, n_rows * k)))
    parts = values.new_empty(n_rows * k * width)
    total = values.new_empty(n_rows, d)
    place = plan.place.view(n_rows, k)
    for left in range(0, d, width):
        right = min(left + width, d)
        part = parts[: n_rows * k * (right - left)].view(-1, right - left)
        for expert, start, stop in spans:
            torch.mm(values[start:stop], factors[expert, :, left:right], out=part[start:stop])
        total[:, left:right] = F.embedding_bag(place, part, mode="sum")
    return total
