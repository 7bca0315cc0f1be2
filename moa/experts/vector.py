"""Rank-one experts whose down projection is the router: what is left of each is one vector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..delta import Delta, low_rank
from ..errors import FoldError
from ..types import Routing
from .bank import Axes, ExpertBank
from .fused import Fused


class VectorBank(ExpertBank):
    """E vectors: E_e(x) = s · up_e whatever x is; the routing's signed weight carries the row.

    | parameter | shape | start |
    |---|---|---|
    | up (columns of B) | (E, o) | zero |

    All E vectors are multiplied; unchosen ones have weight 0. At E = 32 the product with (T, E) is bound by writing
    (T, o), not by its arithmetic, and gathering k of E vectors per row reads more than it saves.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        directions: (E, i) what the router multiplies x by; with them an expert is a weight change, up_e directions_e^T.
        options: as in `ExpertBank`; dropout acts on the weights.
    """

    equal_at_init = True
    carries_input = True
    per_expert = ("up", "directions")
    axes: ClassVar[Axes] = {"up": "out", "directions": "in"}

    directions: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, n_experts: int, *, directions: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.up = nn.Parameter(torch.empty(n_experts, d_out))
        self.register_buffer("directions", directions, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set up (E, o) to zero."""
        nn.init.zeros_(self.up)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · up_e on every row of x (*rows, i), (*rows, o)."""
        return (self.up[expert] * self.scaling).to(x.dtype).expand(*x.shape[:-1], self.d_out)

    def delta(self, expert: int) -> Delta:
        """Return s · up_e directions_e^T, (o, i), of rank one.

        Raises:
            FoldError: the router's directions are not known.
        """
        if self.directions is None:
            raise FoldError("vector experts whose router's directions are not known are not a weight change.")
        return low_rank(self.directions[expert, None], self.up[expert, :, None].detach(), self.scaling)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e s up_e, (*rows, o), for the rows of x (*rows, i)."""
        y = self.spread(x, routing) @ self.up.to(x.dtype)  # rows of the routing: they may be fewer than x's
        return y.expand(*x.shape[:-1], self.d_out)

    @property
    def fused(self) -> FusedVectors:
        """The second product added onto the base's, on rows (*rows, i)."""
        return FusedVectors(self)

    def spread(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the routing's weights over all experts, times s, (*rows, E), for x (*rows, i)."""
        dense = (routing.dense() * self.scaling).to(x.dtype)  # (*rows, E)
        return F.dropout(dense, self.dropout, self.training)


class FusedVectors(Fused):
    """Base and vectors on rows (*rows, i): the second product adds onto the first."""

    __slots__ = ()

    bank: VectorBank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b + Σ_e w_e s up_e, (*rows, o); the second product adds onto the first."""
        base = F.linear(x, weight, bias)  # (*rows, o)
        mixed = self.bank.spread(x, routing).to(base.dtype)  # (*rows, E)
        if mixed.shape[:-1] != base.shape[:-1]:  # the rows broadcast, which addmm does not
            return base + mixed @ self.bank.up.to(base.dtype)
        up = self.bank.up.to(base.dtype)
        return torch.addmm(base.view(-1, self.bank.d_out), mixed.reshape(-1, self.bank.n_experts), up).view(base.shape)
