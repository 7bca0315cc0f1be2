"""A gate with a learned threshold: as many experts as pass it. Liu and Luo 2024 (AdaMoLE), arXiv 2405.00361."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import exact_linear
from ..types import Context, Routing
from .router import Router


class ThresholdRouter(Router):
    """Keeps every expert whose probability passes a threshold that the row itself sets.

    p = softmax(G x);  τ = τ_max · sigmoid(t · x + c);  w_e = max(p_e − τ, 0) / Σ_e max(p_e − τ, 0)

    | parameter | shape | start |
    |---|---|---|
    | weight (G) | (E, i) | uniform ±1/√i |
    | threshold_weight (t) | (1, i) | uniform ±1/√i |
    | threshold_bias (c) | (1,) | uniform ±1/√i, as nn.Linear |

    With τ_max = 1/E at least one expert always passes; with a larger one a row may have none, and no weight at all.

    Args:
        d_in: i.
        n_experts: E.
        max_threshold: τ_max in (0, 1]; None is 1/E.
        losses: name -> coefficient, see `moa.objective.losses.LOSSES`.

    Raises:
        ConfigError: max_threshold outside (0, 1].
    Source: arXiv 2405.00361, eq. 4-7.
    Differs: the released balance loss takes p − τ and does not divide by the experts per row; here it is the
        library's, on p, with minimum 1 whatever the number of experts that pass.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        *,
        max_threshold: float | None = None,
        losses: dict[str, float] | None = None,
    ) -> None:
        super().__init__(d_in, n_experts, n_experts)
        check_threshold(max_threshold)
        self.max_threshold = 1.0 / n_experts if max_threshold is None else max_threshold
        self.loss_weights = {name: c for name, c in (losses or {}).items() if c}
        self.weight = nn.Parameter(torch.empty(n_experts, d_in))
        self.threshold_weight = nn.Parameter(torch.empty(1, d_in))
        self.threshold_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight (E, i), threshold_weight (1, i) and threshold_bias (1,) anew."""
        bound = self.d_in**-0.5
        for parameter in (self.weight, self.threshold_weight, self.threshold_bias):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): weights (*rows, E), exactly 0 where an expert does not pass."""
        logits = exact_linear(x, self.weight)  # (*rows, E)
        scores = logits.softmax(-1)
        level = exact_linear(x, self.threshold_weight) + self.threshold_bias  # (*rows, 1)
        excess = (scores - self.max_threshold * level.sigmoid()).clamp(min=0)  # (*rows, E)
        total = excess.sum(-1, keepdim=True)  # (*rows, 1), 0 where no expert passes
        weights = excess / torch.where(total > 0, total, 1)
        return Routing(weights, None, self.n_experts, logits, scores)

    def constant(self, task: int | None = None) -> Routing | None:
        """Return the routing of rows () where there is one expert, whose probability of 1 passes; else None."""
        return self.every_expert(self.weight) if self.n_experts == 1 else None


def check_threshold(max_threshold: float | None) -> None:
    """Check the largest threshold of a probability; None is 1/E.

    Raises:
        ConfigError: outside (0, 1].
    """
    if max_threshold is not None and not 0 < max_threshold <= 1:
        raise ConfigError(f"max_threshold must be in (0, 1], got {max_threshold}.")
