"""Experts choose rows: balanced by construction, but a row's routing depends on the others. For encoders.

Zhou et al. 2022 (expert choice), arXiv 2202.09368; Puigcerver et al. 2023 (Soft MoE), arXiv 2308.00951.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError
from ..kernels import exact_linear
from ..types import Context, Routing
from .router import Router


class ExpertChoiceRouter(Router):
    """Each expert takes the C rows of an example that score highest for it; a row may have any number of experts.

    S = softmax over experts of G x;  w_{t,e} = S_{t,e} where t is among expert e's first C = ⌈c · n / E⌉ of n rows

    | parameter | shape | start |
    |---|---|---|
    | weight (G) | (E, i) | uniform ±1/√i |

    Args:
        d_in: i.
        n_experts: E.
        capacity: c, experts per row on average.

    Raises:
        ConfigError: capacity is not positive.
    Source: arXiv 2202.09368, eq. 1-3.
    Differs: each example chooses among its own rows, padding left out, so that no example's output depends on the
        others in its batch; the paper's experts choose over the whole batch.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"weight": 0}
    causal = False
    rowwise = False

    def __init__(self, d_in: int, n_experts: int, *, capacity: float = 2.0) -> None:
        super().__init__(d_in, n_experts, n_experts)
        check_capacity(capacity)
        self.capacity = capacity
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight (E, i) anew."""
        bound = self.d_in**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (B, S, i), or (B, i) as one row each: weights (*rows, E), 0 where not taken."""
        logits = exact_linear(x, self.weight)  # (*rows, E)
        scores = logits.softmax(-1)
        rows, real = sequence_rows(scores, x, context)  # (B, S, E), (B, S, 1)
        offered = rows.masked_fill(~real, -1.0)  # below every probability: padding comes last
        place = offered.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the expert's first choice
        takes = (self.capacity / self.n_experts * real.sum(1, keepdim=True)).ceil()  # (B, 1, 1)
        taken = (place < takes) & real  # (B, S, E)
        return Routing(torch.where(taken, rows, 0).view_as(scores), None, self.n_experts, logits, scores)


class SoftRouter(Router):
    """Gives every expert p slots, each a convex combination of an example's rows; rows get combinations of slots.

    L = τ · x̂ μ̂^T over slots (x and μ normalised);  dispatch = softmax of L over rows;  combine = softmax over slots

    The routing's logits are L, (*rows, E · p), slot by slot within an expert; `SlotBank` does what they say.

    | parameter | shape | start |
    |---|---|---|
    | slots (μ) | (E · p, i) | N(0, 1/i) |
    | scale (τ) | (1,) | 1 |

    Args:
        d_in: i.
        n_experts: E.
        n_slots: p, slots per expert.

    Raises:
        ConfigError: n_slots < 1.
    Source: arXiv 2308.00951, §2.1 and algorithm 2; google-research/vmoe.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"slots": 0}
    causal = False
    rowwise = False

    def __init__(self, d_in: int, n_experts: int, *, n_slots: int = 1) -> None:
        super().__init__(d_in, n_experts, n_experts)
        check_slots(n_slots)
        self.n_slots = n_slots
        self.slots = nn.Parameter(torch.empty(n_experts * n_slots, d_in))
        self.scale = nn.Parameter(torch.empty(1))  # FSDP2 shards no scalars
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the slots (E · p, i) anew; the scale is 1."""
        nn.init.normal_(self.slots, std=self.d_in**-0.5)
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (B, S, i): weights (*rows, E), its share of each expert; logits (*rows, E · p)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # norms are formed in fp32
        logits = exact_linear(F.normalize(wide, dim=-1), F.normalize(self.slots, dim=-1)) * self.scale
        rows, real = sequence_rows(logits, x, context)  # (B, S, E · p), (B, S, 1)
        # a row that does not count belongs to no slot; finite, so that its own combination stays a number
        logits = rows.masked_fill(~real, torch.finfo(rows.dtype).min).view_as(logits)
        share = logits.softmax(-1)  # (*rows, E · p)
        weights = reduce(share, "... (e p) -> ... e", "sum", e=self.n_experts)
        return Routing(weights, None, self.n_experts, logits, weights)


def check_capacity(capacity: float) -> None:
    """Check that a capacity is positive.

    Raises:
        ConfigError: it is not.
    """
    if capacity <= 0:
        raise ConfigError(f"capacity must be positive, got {capacity}.")


def check_slots(n_slots: int) -> None:
    """Check that each expert has a slot.

    Raises:
        ConfigError: n_slots < 1.
    """
    if n_slots < 1:
        raise ConfigError(f"n_slots must be at least 1, got {n_slots}.")


def sequence_rows(values: Tensor, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Return values (*rows, E) as (B, S, E), and which of the rows count, (B, S, 1) bool.

    Raises:
        ShapeError: x has lost its sequence axis.
    """
    if x.ndim == 2:
        return values.unsqueeze(1), torch.ones_like(values[:, None, :1], dtype=torch.bool)
    if x.ndim != 3:
        raise ShapeError(f"experts choose among the rows of an example: x must be (B, S, i), got {tuple(x.shape)}.")
    mask = context.mask_for(x)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    return values, real.unsqueeze(-1)
