"""Which slots go to which expert: the sort that grouped engines share. No host sync: graphs can hold it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """Slots (row, j) of a routing in the order of their experts.

    Args:
        order: (T·K,) int64 flat slot t·K + j at each sorted place; stable, so rows ascend within an expert.
        rows: (T·K,) int64 row t at each sorted place.
        place: (T·K,) int64 sorted place of each flat slot, the inverse of `order`.
        offsets: (E + 1,) int64; expert e owns the places offsets[e] … offsets[e + 1] - 1.
    """

    order: Tensor
    rows: Tensor
    place: Tensor
    offsets: Tensor


def sort_slots(indices: Tensor, n_experts: int) -> Plan:
    """Return the plan of a routing.

    Args:
        indices: (T, K) int64 experts of each row's slots.
        n_experts: E.

    Returns:
        Tensors on the device of indices; deterministic.
    """
    flat = indices.flatten()
    sorted_experts, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.arange(n_experts + 1, device=order.device)
    # searchsorted instead of bincount: no sync, and it can be captured in a graph.
    offsets = torch.searchsorted(sorted_experts, edges)
    rows = torch.div(order, indices.shape[-1], rounding_mode="floor")
    return Plan(order, rows, place, offsets)


def sort_values(values: Tensor, plan: Plan) -> Tensor:
    """Return slot values (T, K, r) in the order of their experts, (T·K, r)."""
    return values.reshape(-1, values.shape[-1]).index_select(0, plan.order)


def unsort_values(values: Tensor, plan: Plan, indices: Tensor) -> Tensor:
    """Return sorted values (T·K, r) in the order of the slots, (T, K, r), for indices (T, K)."""
    return values.index_select(0, plan.place).view(*indices.shape, values.shape[-1])
