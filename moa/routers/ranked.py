"""A linear gate that also chooses, row by row, at which rank elastic experts act."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import exact_linear
from ..types import Context, Routing
from .linear import LinearRouter


class RankedRouter(LinearRouter):
    """A linear gate with a second one over ranks: the row's experts act with that many components.

    The chosen rank's probability p multiplies the weights as p / p, so that its gradient reaches the gate.

    | parameter | shape | start |
    |---|---|---|
    | weight | (E, i) | as `LinearRouter` |
    | rank_weight | (L, i) | as weight |

    Args:
        d_in: i.
        n_experts: E.
        k: K.
        ranks: L ranks, different ones, each at least 1.
        options: as in `LinearRouter`.

    Raises:
        ConfigError: ranks that are not different whole numbers from 1.
    Source: the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432, §4, on a choice of nested ranks.
    """

    levels: Tensor

    def __init__(self, d_in: int, n_experts: int, k: int, ranks: tuple[int, ...] = (1,), **options: Any) -> None:
        check_ranks(ranks)
        super().__init__(d_in, n_experts, k, **options)
        self.register_buffer("levels", torch.tensor(ranks), persistent=False)
        bound = d_in**-0.5
        self.rank_weight = nn.Parameter(torch.empty(len(ranks), d_in).uniform_(-bound, bound))

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): weights and indices (*rows, K), ranks (*rows, 1)."""
        routing = super().forward(x, context)
        shares = exact_linear(x, self.rank_weight).softmax(-1)  # (*rows, L)
        share, level = shares.max(-1, keepdim=True)  # (*rows, 1)
        weights = routing.weights * (share / share.detach()).to(routing.weights.dtype)
        return Routing(weights, *routing.given[1:]).at(self.levels[level])

    def constant(self, task: int | None = None) -> Routing | None:
        """Return None: the ranks depend on the row (i,)."""
        return None


def check_ranks(ranks: tuple[int, ...], highest: int | None = None) -> None:
    """Check the ranks that a gate chooses among; no tensors, so no shapes.

    Args:
        ranks: to choose among.
        highest: R of the experts.

    Raises:
        ConfigError: none, twice the same, or one outside 1 … R.
    """
    whole = all(type(rank) is int and rank >= 1 for rank in ranks)
    if not ranks or not whole or len(set(ranks)) < len(ranks) or (highest is not None and max(ranks) > highest):
        raise ConfigError(f"ranks must be different whole numbers in 1 … {highest or 'rank'}, got {ranks!r}.")
