"""Experts that are a few trained entries of a matrix, at places that are chosen once: SHiRA, QWHA."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..kernels import ByHand, Changes
from ..kernels.few_entries import Order, entry_gradients, entry_product, order_entries
from ..kernels.one_weight import OneWeight
from ..layers import Site
from .structured import FEW_ROWS, StructuredBank, Tensors

# Measured on one CPU core: up to such a share of the entries, sums over them take less time than dense products; and
# up to so many rows, all of one routing, less than the change added to the base.
_SPARSE = 1 / 8
_FEW_ALONE = 64


class EntriesBank(StructuredBank):
    """E experts of n entries of a matrix (o, i) each: scatter(places_e, values_e).

    | tensor | shape | start |
    |---|---|---|
    | values | (E, n) | zero |
    | places | (E, n) int64, in the flattened matrix | chosen once, never trained |

    Args:
        d_in: i.
        d_out: o.
        places: (E, n), distinct within an expert.
        stored: the places go into a checkpoint: no seed and no weight gives them again.
        options: scaling and dropout as in `ExpertBank`.
    """

    per_expert: ClassVar[tuple[str, ...]] = ("values", "places")
    averages: ClassVar[bool] = True

    places: Tensor

    def __init__(self, d_in: int, d_out: int, places: Tensor, stored: bool = False, **options: Any) -> None:
        super().__init__(d_in, d_out, len(places), **options)
        self.register_buffer("places", places, persistent=stored)
        self.values = nn.Parameter(torch.zeros(places.shape))
        self._sorted: tuple[Tensor, int, Order] | None = None

    def reset_parameters(self) -> None:
        """Set the values (E, n) to zero; the places stay."""
        nn.init.zeros_(self.values)

    def matrix(self, tensors: Tensors) -> Tensor:
        """Return the matrix (o, i) with one expert's values at its places."""
        values = tensors["values"]
        flat = values.new_zeros(self.d_out * self.d_in)
        return flat.scatter_(0, tensors["places"], values).view(self.d_out, self.d_in)

    def times(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return that matrix times x, (*rows, o) of x (*rows, i): entry by entry on few rows."""
        if x.shape[:-1].numel() > FEW_ROWS:
            return F.linear(x, self.matrix(tensors).to(x.dtype))
        places, values = tensors["places"], tensors["values"].to(x.dtype)
        products = x[..., places % self.d_in] * values  # (*rows, n)
        return x.new_zeros(*x.shape[:-1], self.d_out).index_add(-1, places // self.d_in, products)

    def by_entries(self, changes: Changes, x: Tensor | None, scaling: float = 1.0) -> Changes:
        """Return changes that are s times those matrices, on x (*rows, i): on a CPU, as sums over few entries."""
        if x is None or x.device.type != "cpu" or self.values.shape[1] > _SPARSE * self.d_out * self.d_in:
            return changes
        sums = _Sums(scaling)
        own = {**changes.own, **self._order()._asdict()}
        by_hand = ByHand(sums.add, sums.backward)
        return replace(changes, apply=sums.apply, own=own, few=math.inf, few_alone=_FEW_ALONE, by_hand=by_hand)

    def _order(self) -> Order:
        """Return the order of the places (E, n), sorted once for as long as they stay."""
        if self.places.is_inference():  # it does not say whether it was written to
            return order_entries(self.places, self.d_out, self.d_in)
        known = self._sorted
        if known is None or known[0] is not self.places or known[1] != self.places._version:
            order = order_entries(self.places, self.d_out, self.d_in)
            known = self._sorted = (self.places, self.places._version, order)
        return known[2]

    def overlap(self) -> Tensor:
        """Return how many places each pair of experts shares, (E, E) int64; n² / (o i) is what chance gives."""
        marks = torch.zeros(self.n_experts, self.d_out * self.d_in, device=self.places.device)
        marks.scatter_(1, self.places, 1.0)
        return (marks @ marks.T).long()

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, entries={self.values.shape[1]}"


@dataclass(frozen=True)
class _Sums:
    """One expert's products as sums over its entries, and their derivative.

    Args:
        scaling: s.
    """

    scaling: float

    def apply(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return s F x, (*rows, o) of x (*rows, i)."""
        return entry_product(x, self._scaled(tensors["values"]), _order_of(tensors))

    def add(self, weight: OneWeight, tensors: Tensors, scale: Tensor) -> None:
        """Add scale (1,) times s F (o, i) to the one weight of all rows."""
        onto = weight.opened(tensors["values"], scale)
        values = self._scaled(tensors["values"]) * scale
        onto.view(-1).index_add_(0, tensors["places"], values.to(onto.dtype))

    def backward(self, x: Tensor, above: Tensor, tensors: Tensors, to_x: bool) -> tuple[Tensor | None, Tensors]:
        """Return s F^T above (*rows, i), or None, and the gradient of the values (n,)."""
        back, found = entry_gradients(x, above, self._scaled(tensors["values"]), _order_of(tensors), to_x)
        return back, {"values": self._scaled(found)}

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.scaling == 1.0 else values * self.scaling


def _order_of(tensors: Tensors) -> Order:
    return Order(*(tensors[name] for name in Order._fields))


def n_entries(site: Site, density: float, rank: int) -> int:
    """Return how many of a matrix's o · i entries an expert trains: a share of them, or rank · (o + i).

    Args:
        site: the layer (i -> o).
        density: share; 0 is as many as a LoRA has.
        rank: r of that LoRA.

    Raises:
        ConfigError: more entries than there are.
    """
    size = site.d_out * site.d_in
    count = max(1, int(density * size)) if density else rank * (site.d_out + site.d_in)
    if count > size:
        most = size // (site.d_out + site.d_in)
        raise ConfigError(
            f"{site.name}: rank={rank} is {count} entries of a weight ({site.d_out}, {site.d_in}) that has {size}: "
            f"at most rank={most} fits, or set density."
        )
    return count


def check_density(density: float) -> None:
    """Check a share of the entries; no tensors, so no shapes.

    Raises:
        ConfigError: it is outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise ConfigError(f"density must be in [0, 1], got {density}.")


def random_places(size: int, count: int, draw: torch.Generator) -> Tensor:
    """Return `count` distinct random places (n,) of 0 … size - 1, in the order in which they were drawn."""
    if 4 * count > size:
        return torch.randperm(size, generator=draw)[:count]
    kept = torch.empty(0, dtype=torch.long)
    while len(kept) < count:  # a permutation of millions for a few thousand takes a hundred times as long
        drawn = torch.cat([kept, torch.randint(size, (count + count // 8 + 8,), generator=draw)])
        values, order = drawn.sort(stable=True)
        first = torch.ones_like(values, dtype=torch.bool)
        first[1:] = values[1:] != values[:-1]
        kept = drawn[order[first].sort().values]
    return kept[:count]
