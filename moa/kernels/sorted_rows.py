"""The `sorted` engine: rows gathered in the order of their experts, one product each. For large E·r on a CPU.

It reads no expert that no row chose. Contract of the functions: see `concat.py`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import concat
from .concat import add_base, scale, slot_dot
from .plan import Plan, sort_slots

_BLOCK_ELEMENTS = 1 << 20
_MIN_COLUMNS = 256


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    if indices is None:  # every row has every expert: there is nothing to sort
        return concat.forward(x, a, b, weights, indices, base, bias)
    plan, spans = _plan(indices, a.shape[0])
    rank, n_slots = a.shape[1], indices.numel()
    hidden_sorted = x.new_empty(n_slots, rank)
    for expert, start, stop in spans:
        torch.mm(x.index_select(0, plan.rows[start:stop]), a[expert].T, out=hidden_sorted[start:stop])
    hidden = hidden_sorted.index_select(0, plan.place).view(*indices.shape, rank)
    mixed = scale(hidden, weights).reshape(n_slots, rank).index_select(0, plan.order)
    y = _expand(mixed, b, plan, spans, indices.shape)
    if bias is not None:
        y += bias
    return (y if base is None else add_base(y, x, base)), hidden


def backward(
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
    if indices is None:
        return concat.backward(grad, x, a, b, weights, indices, hidden, base, needs)
    plan, spans = _plan(indices, a.shape[0])
    rank, n_slots = a.shape[1], indices.numel()
    need_x, need_a, need_b, need_weights = needs
    through = need_x or need_a or need_weights
    grad_b = torch.zeros_like(b) if need_b else None
    mixed = None
    if need_b:
        assert hidden is not None
        mixed = scale(hidden, weights).reshape(n_slots, rank).index_select(0, plan.order)
    sorted_slots = grad.new_empty(n_slots, rank)
    for expert, start, stop in spans:
        rows = grad.index_select(0, plan.rows[start:stop])
        if through:
            torch.mm(rows, b[expert].T, out=sorted_slots[start:stop])
        if grad_b is not None and mixed is not None:
            torch.mm(mixed[start:stop].T, rows, out=grad_b[expert])
    grad_x = grad_a = grad_weights = None
    if through:
        grad_slots = sorted_slots.index_select(0, plan.place).view(*indices.shape, rank)
        if need_weights:
            assert hidden is not None
            grad_weights = slot_dot(grad_slots, hidden, weights)
        if need_x or need_a:
            grad_hidden = scale(grad_slots, weights).reshape(n_slots, rank).index_select(0, plan.order)
            if need_x:
                grad_x = _expand(grad_hidden, a, plan, spans, indices.shape)
            if need_a:
                assert x is not None
                grad_a = torch.zeros_like(a)
                for expert, start, stop in spans:
                    rows = x.index_select(0, plan.rows[start:stop])
                    torch.mm(grad_hidden[start:stop].T, rows, out=grad_a[expert])
            if base is not None and grad_x is not None:
                grad_x.addmm_(grad, base)
    found = (grad_x, grad_a, grad_b, grad_weights)
    return [value for value in found if value is not None]


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), for factors (E, p, i) and e = indices[t, j]."""
    plan, spans = _plan(indices, factors.shape[0])
    parts = x.new_empty(indices.numel(), factors.shape[1])
    for expert, start, stop in spans:
        torch.mm(x.index_select(0, plan.rows[start:stop]), factors[expert].T, out=parts[start:stop])
    return parts.index_select(0, plan.place).view(*indices.shape, factors.shape[1])


def slot_gradients(grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` names, from that of `slot_products`, grad (T, K, p)."""
    plan, spans = _plan(indices, factors.shape[0])
    values = grad.view(-1, factors.shape[1]).index_select(0, plan.order)
    found: list[Tensor] = []
    if needs[0]:
        found.append(_expand(values, factors, plan, spans, indices.shape))
    if needs[1]:
        assert x is not None
        gram = torch.zeros_like(factors)
        for expert, start, stop in spans:
            torch.mm(values[start:stop].T, x.index_select(0, plan.rows[start:stop]), out=gram[expert])
        found.append(gram)
    return found


def _plan(indices: Tensor, n_experts: int) -> tuple[Plan, list[tuple[int, int, int]]]:
    """Return the plan and (expert, start, stop) of every expert that some row chose."""
    plan = sort_slots(indices, n_experts)
    edges = plan.offsets.tolist()
    spans = [(e, start, stop) for e, (start, stop) in enumerate(pairwise(edges)) if stop > start]
    return plan, spans


def _expand(
    values: Tensor, factors: Tensor, plan: Plan, spans: list[tuple[int, int, int]], slots: torch.Size
) -> Tensor:
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
