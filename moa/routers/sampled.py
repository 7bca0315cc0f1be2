"""ReMix: the router's distribution decides which experts act, not how much; it learns by reinforcement.

Qiu et al. 2026, arXiv 2603.10160.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import exact_linear
from ..kernels.gate import SCORES
from ..types import Context, Routing
from .router import Router, frozen_while_decoding, pool


class SampledRouter(Router):
    """Draws k of E without replacement from softmax(P x) in training, takes the top k at inference; weights are 1.

    | parameter | shape | start |
    |---|---|---|
    | weight | (E, i) | uniform ±1/√i (the paper does not give one) |

    The constant ω of the paper is the bank's scaling. The router sees x detached, so the policy term moves only
    the router, never the experts of earlier layers.

    The M forwards of a step start from the same random state, so that they have the same dropout. Each draws from it
    the noise of all M selections and takes its own, so that the selections are independent all the same, and the
    stream is in the same place after each of the M. In any other forward the router draws the noise of one.

    Args:
        d_in: i.
        n_experts: E.
        k: K.
        samples: M, selections of the whole network per step, at least 2.
        granularity: "token" decides per row; "sequence" once per example from the mean over the prompt.

    Raises:
        ConfigError: samples < 2, an unknown granularity, bad k.
    Source: arXiv 2603.10160, §4.
    Differs: the paper does not say whether a choice is made per token or per sequence; both are here.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"weight": 0}
    stochastic = True

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        k: int,
        *,
        samples: int = 2,
        granularity: Literal["token", "sequence"] = "token",
    ) -> None:
        super().__init__(d_in, n_experts, k)
        check_sampling(samples, granularity)
        self.samples, self.granularity = samples, granularity
        self.per_row = granularity == "token"
        self.rowwise = granularity == "token"
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight (E, i) anew."""
        bound = self.d_in**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i); rows are (B, 1) at sequence granularity, log_prob only in training."""
        draw = None if context.draws is None else context.draws.current()
        if self.granularity == "token":
            return self._decide(x.detach(), draw)
        kept = frozen_while_decoding(self, context, x.shape[0])
        if kept is not None:
            return kept
        routing = self._decide(pool(x.detach(), context.routing_masks_for(x)), draw)
        if context.frozen_routings is not None:
            context.frozen_routings[id(self)] = routing
        return routing

    def constant(self, task: int | None = None) -> Routing | None:
        """Return the routing of rows () where every expert is drawn on every row; else None."""
        return self.every_expert(self.weight) if self.k == self.n_experts else None

    def _decide(self, x: Tensor, draw: tuple[int, int] | None) -> Routing:
        """Return the routing of x (*rows, i), as selection m of M where `draw` is (m, M)."""
        logits = exact_linear(x, self.weight)  # (*rows, E)
        scores = SCORES["softmax"]
        if not self.training:
            indices = logits.topk(self.k, -1).indices
            return Routing(torch.ones_like(indices, dtype=logits.dtype), indices, self.n_experts, logits, scores)
        # top k of log q + Gumbel noise, in descending order, is a draw without replacement
        number, samples = draw or (0, 1)
        noise = logits.new_empty(samples, *logits.shape).exponential_()  # (M, *rows, E), equal in all M forwards
        indices = (logits.detach() - noise[number].log()).topk(self.k, -1).indices  # (*rows, K)
        weights = torch.ones_like(indices, dtype=logits.dtype)
        return Routing(weights, indices, self.n_experts, logits, scores, _drawn)


def _drawn(routing: Routing) -> Tensor:
    """Return log Q of a routing's choice, (*rows,)."""
    assert routing.logits is not None and routing.indices is not None
    return plackett_luce(routing.logits, routing.indices)


def plackett_luce(logits: Tensor, indices: Tensor) -> Tensor:
    """Return log Q of drawing the ordered tuple without replacement, in nats, (*rows,).

    log Q = Σ_j [ logit_{i_j} − log Σ_{e not drawn before j} exp logit_e ]

    The masked log-sum-exp stays finite for a confident router, where 1 − cumsum(q) rounds to 0.

    Args:
        logits: (*rows, E).
        indices: (*rows, K) int64, in the order drawn.
    Source: arXiv 2603.10160, §4 (sequential draws, the remaining mass renormalised).
    """
    k = indices.shape[-1]
    turn = torch.arange(k, device=logits.device)
    # at which turn each expert was drawn, k where at none: (*rows, E)
    drawn = torch.full_like(logits, k, dtype=torch.int64).scatter(-1, indices, turn.expand(indices.shape))
    before = drawn.unsqueeze(-2) < turn.unsqueeze(-1)  # (*rows, K, E)
    rest = logits.unsqueeze(-2).masked_fill(before, float("-inf")).logsumexp(-1)  # (*rows, K)
    return (logits.gather(-1, indices) - rest).sum(-1)


def check_sampling(samples: int, granularity: str) -> None:
    """Check M, and what a selection is made for.

    Raises:
        ConfigError: samples < 2, or an unknown granularity.
    """
    if samples < 2:
        raise ConfigError(f"ReMix compares selections with each other: samples must be at least 2, got {samples}.")
    if granularity not in ("token", "sequence"):
        raise ConfigError(f"granularity must be 'token' or 'sequence', got {granularity!r}.")
