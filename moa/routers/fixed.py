"""A routing that never changes: averages, a single LoRA, tests."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..types import Context, Routing
from .router import Router


class FixedRouter(Router):
    """Gives every row the same weights over all experts.

    | buffer | shape | start |
    |---|---|---|
    | weights | (E,) | 1/E each unless given |

    Args:
        d_in: i, unused; every router has it.
        n_experts: E.
        weights: (E,), any sign.

    Raises:
        ShapeError: weights are not (E,).
    """

    made_anew = ("weights",)
    per_row = False

    weights: Tensor

    def __init__(self, d_in: int, n_experts: int, weights: Tensor | None = None) -> None:
        super().__init__(d_in, n_experts, n_experts)
        if weights is None:
            weights = torch.full((n_experts,), 1.0 / n_experts)
        if weights.shape != (n_experts,):
            raise ShapeError(f"weights must be ({n_experts},), got {tuple(weights.shape)}.")
        self.register_buffer("weights", weights.float().clone())

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the constant routing of rows (): weights (E,)."""
        return self.constant()

    def constant(self, task: int | None = None) -> Routing:
        """Return the routing of rows () that every input gets."""
        return Routing(self.weights, None, self.n_experts)
