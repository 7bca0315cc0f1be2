"""Experts that are pairs of low-rank factors, drawn, derived or generated: kernels, folding, export come with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compat import is_autocast
from ..delta import Delta, LowRank, low_rank
from ..errors import ConfigError
from ..kernels import Gate, gated_linear, grouped_linear, grouped_sum, has_slots, low_rank_mixture, mixture_linear
from ..kernels.gate import SCORES
from ..kernels.low_rank import is_plain
from ..types import Routing
from .bank import ExpertBank
from .fused import Fused


class FactoredBank(ExpertBank):
    """E experts E_e(x) = s · (x down_e^T) up_e; a family writes `factors`, and the rest is inherited."""

    per_expert: ClassVar[tuple[str, ...]] = ("down", "up")

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o): the concatenation over experts is a free view of both."""
        raise NotImplementedError

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · (x down_e^T) up_e, (*rows, o), of x (*rows, i)."""
        down, up = self.factors()
        return F.linear(x, down[expert].to(x.dtype)) @ up[expert].to(x.dtype) * self.scaling

    def delta(self, expert: int) -> Delta:
        """Return s · up_e^T down_e, (o, i), as factors."""
        down, up = self.factors()
        return low_rank(down[expert].detach(), up[expert].detach().T, self.scaling)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i), by the grouped kernels."""
        down, up = self.factors()
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return low_rank_mixture(x, down, up, routing.weights, routing.indices, scaling=self.scaling, engine=self.engine)

    @property
    def fused(self) -> FusedFactors:
        """Base, gate and slots in one step with the experts, on rows (*rows, i)."""
        return FusedFactors(self)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


class FusedFactors(Fused):
    """What the kernels offer for low-rank experts on rows (*rows, i)."""

    __slots__ = ()

    bank: FactoredBank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b + Σ_e w_e E_e(x), (*rows, o), adapter first so that the base product adds in place."""
        bank = self.bank
        if bank.training and bank.dropout:
            return super().add_linear(x, routing, weight, bias)
        down, up = bank.factors()
        weights, indices = routing.weights, routing.indices
        return mixture_linear(x, weight, bias, down, up, weights, indices, scaling=bank.scaling, engine=bank.engine)

    def add_gated(self, x: Tensor, gate: Gate, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Routing] | None:
        """Return base and mixture (*rows, o) and the gate's routing, as one node of the graph, in eager code."""
        bank = self.bank
        if bank.training and bank.dropout:
            return None
        down, up = bank.factors()
        if not is_plain(x, gate.weight, down, up) or is_autocast():
            return None
        y, weights, indices, logits = gated_linear(x, weight, bias, gate, down, up, bank.scaling, engine=bank.engine)
        return y, Routing(weights, indices, bank.n_experts, logits, SCORES[gate.score])

    def shared_hidden(self, others: Sequence[Fused], x: Tensor, indices: Tensor) -> list[Tensor]:
        """Return x down_e^T of each slot for every bank, (*rows, K, r), of x (*rows, i), whose dropout they share."""
        bank = self.bank
        alike = [other.bank for other in others if isinstance(other, FusedFactors) and other.bank.engine == bank.engine]
        if len(alike) < len(others) or not has_slots(bank.engine):
            return []
        downs = [other.factors()[0] for other in alike]
        down = torch.cat(downs, 1)  # (E, Σ r, i)
        # (*rows, K, Σ r)
        hidden = grouped_linear(F.dropout(x, bank.dropout, bank.training), down, indices, engine=bank.engine)
        return list(hidden.split([one.shape[1] for one in downs], -1))

    def open_slots(self, x: Tensor, indices: Tensor, onto: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return onto + E_{e_k}(x) for each slot k, (*rows, K, o), by the grouped kernels."""
        bank = self.bank
        if not has_slots(bank.engine):
            return super().open_slots(x, indices, onto)
        down, up = bank.factors()
        if hidden is None:
            hidden = grouped_linear(F.dropout(x, bank.dropout, bank.training), down, indices, engine=bank.engine)
        scaled = (hidden * bank.scaling).unsqueeze(-2)  # (*rows, K, 1, r)
        out = grouped_sum(scaled, up, indices.unsqueeze(-1), engine=bank.engine)  # (*rows, K, o)
        return out.to(onto.dtype).add_(onto.unsqueeze(-2))

    def close_slots(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return Σ_k w_k E_{e_k}(x_k), (*rows, o), of x (*rows, K, i): the slots are summed at rank size."""
        bank = self.bank
        if not has_slots(bank.engine):
            return super().close_slots(x, weights, indices)
        down, up = bank.factors()
        x = F.dropout(x, bank.dropout, bank.training)
        hidden = grouped_linear(x, down, indices.unsqueeze(-1), engine=bank.engine).squeeze(-2)  # (*rows, K, r)
        weighted = hidden * (weights * bank.scaling).to(hidden.dtype).unsqueeze(-1)  # (*rows, K, r)
        return grouped_sum(weighted, up, indices, engine=bank.engine)


@torch.no_grad()
def read_factors(change: Delta, down: Tensor, up: Tensor, scaling: float) -> None:
    """Write a low-rank change as one expert's factors, rows beyond its rank zero.

    Args:
        change: (o, i), of rank at most r.
        down: (r, i), written to.
        up: (r, o), written to.
        scaling: s, by which the expert's product will be multiplied.

    Raises:
        ConfigError: the change is not low-rank, has a larger rank, or belongs to another layer.
    """
    if not isinstance(change, LowRank) or change.rank > down.shape[0]:
        raise ConfigError(
            f"an expert of rank {down.shape[0]} cannot hold a "
            + (f"change of rank {change.rank}." if isinstance(change, LowRank) else "change that is not low-rank.")
        )
    o, i = cast(tuple[int, int], tuple(change.shape))
    if (o, i) != (up.shape[1], down.shape[1]):
        raise ConfigError(f"a change ({o}, {i}) is for another layer than ({up.shape[1]}, {down.shape[1]}).")
    down.zero_()
    up.zero_()
    down[: change.rank].copy_(change.down)
    up[: change.rank].copy_(change.up.T / scaling)
