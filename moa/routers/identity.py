"""Routing by place in the batch: streams that run side by side, each with its own expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from ..types import Context, Routing
from .router import Router


class IdRouter(Router):
    """Gives stream m expert m, where n streams are folded into the batch one after the other: rows (n · B, …).

    Args:
        d_in: i, unused.
        n_experts: E = n.
    """

    fixed_size = "each expert is a stream of the whole model, which crosses all others"
    per_row = False
    rowwise = False

    def __init__(self, d_in: int, n_experts: int) -> None:
        super().__init__(d_in, n_experts, 1)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (n · B, …, i): weight 1 for one expert, rows (n · B, 1, …).

        Raises:
            ShapeError: the rows are not a multiple of n.
        """
        rows = x.shape[:-1]
        if not rows or rows[0] % self.n_experts:
            raise ShapeError(f"{self.n_experts} streams need rows (n · B, …), got {tuple(rows)}.")
        stream = torch.arange(self.n_experts, device=x.device).repeat_interleave(rows[0] // self.n_experts)  # (n · B,)
        indices = stream.reshape(-1, *([1] * len(rows)))  # (n · B, 1, …)
        return Routing(torch.ones_like(indices, dtype=torch.float32), indices, self.n_experts)
