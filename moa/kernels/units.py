"""Units of rows that share a routing, and which of them chose which expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plan import sort_slots


def routed_units(x: Tensor, weights: Tensor) -> torch.Size:
    """Return the leading rows of x (*rows, i) over which a routing (*wrows, K) changes: behind them it is constant."""
    rows = x.shape[:-1]
    routed = (1,) * (len(rows) - weights.ndim + 1) + tuple(weights.shape[:-1])
    cut = len(rows)
    while cut and routed[cut - 1] == 1:
        cut -= 1
    return rows[:cut]


def spread_over(value: Tensor, units: torch.Size, n_axes: int) -> Tensor:
    """Return weights or indices (*wrows, K) for each unit, (N, K).

    Args:
        value: of a routing.
        units: the leading rows over which it changes; N is their number.
        n_axes: of x's rows.
    """
    missing = n_axes - value.ndim + 1
    full = value.reshape(*(1,) * missing, *value.shape)
    head = full.reshape(*full.shape[: len(units)], full.shape[-1])  # the axes behind the units have one place each
    return head.expand(*units, head.shape[-1]).reshape(units.numel(), head.shape[-1])


class Group(NamedTuple):
    """An expert, the units that chose it (None: all), and their places among the flat weights (N · K,)."""

    expert: int
    units: Tensor | None
    places: Tensor


def groups_of(weights: Tensor, indices: Tensor | None, n_experts: int) -> list[Group]:
    """Return which units chose which expert, of weights and indices (N, K)."""
    n, k = weights.shape
    if indices is None:
        at = (weights != 0).mT.nonzero()  # (n chosen, 2): expert and unit, experts ascending
        places, units = at[:, 1] * k + at[:, 0], at[:, 1]
        ends = torch.searchsorted(at[:, 0].contiguous(), torch.arange(n_experts + 1, device=at.device)).tolist()
    else:
        plan = sort_slots(indices, n_experts)
        places, units, ends = plan.order, plan.rows, plan.offsets.tolist()
    chosen = [(e, slice(ends[e], ends[e + 1])) for e in range(n_experts) if ends[e] < ends[e + 1]]
    return [Group(e, None if at.stop - at.start == n else units[at], places[at]) for e, at in chosen]


def take(values: Tensor, units: Tensor | None) -> Tensor:
    return values if units is None else values.index_select(0, units)


def add(onto: Tensor, units: Tensor | None, values: Tensor) -> None:
    if units is None:
        onto += values
    else:
        onto.index_add_(0, units, values)
