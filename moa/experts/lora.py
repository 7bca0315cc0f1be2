"""LoRA experts. Hu et al. 2021, arXiv 2106.09685."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import gated_linear, grouped_linear, grouped_sum, has_slots, low_rank_mixture, mixture_linear
from ..kernels.low_rank import is_plain
from ..types import Routing
from .bank import ExpertBank


class LoRABank(ExpertBank):
    """E low-rank experts: E_e(x) = s · (x down_e^T) up_e.

    | parameter | shape | start |
    |---|---|---|
    | down (A) | (E, r, i) | uniform ±1/√i, as nn.Linear and peft |
    | up (B, transposed) | (E, r, o) | zero |

    Both are stored (E, r, features): the concatenation over experts is a free view.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        options: rank, scaling (one for all experts: adapters of other scales are rescaled when read in), dropout,
            engine, as in `ExpertBank`.
    """

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, d_in))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew and set up (E, r, o) to zero."""
        bound = 1 / math.sqrt(self.d_in)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · (x down_e^T) up_e, (*rows, o), of x (*rows, i)."""
        return F.linear(x, self.down[expert].to(x.dtype)) @ self.up[expert].to(x.dtype) * self.scaling

    def delta(self, expert: int) -> Tensor:
        """Return s · up_e^T down_e, (o, i)."""
        return self.up[expert].T @ self.down[expert] * self.scaling

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i), by the grouped kernels."""
        x = F.dropout(x, self.dropout, self.training)
        weights = routing.weights * self.scaling
        return low_rank_mixture(x, self.down, self.up, weights, routing.indices, engine=self.engine)

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b + Σ_e w_e E_e(x), (*rows, o), adapter first so that the base product adds in place."""
        if self.training and self.dropout:
            return super().add_linear(x, routing, weight, bias)
        weights = routing.weights * self.scaling
        return mixture_linear(x, weight, bias, self.down, self.up, weights, routing.indices, engine=self.engine)

    def add_gated(
        self, x: Tensor, gate: Tensor, k: int, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return base and mixture (*rows, o), logits, weights and indices, as one node of the graph, in eager code."""
        if torch.compiler.is_compiling() or (self.training and self.dropout):
            return None
        down, up = self.down, self.up
        if torch.is_autocast_enabled(x.device.type) or not is_plain(x, gate, down, up):
            return None
        return gated_linear(x, weight, bias, gate, down, up, k, self.scaling, engine=self.engine)

    def shared_hidden(self, banks: Sequence[ExpertBank], x: Tensor, indices: Tensor) -> list[Tensor]:
        """Return x down_e^T of each slot for every bank, (*rows, K, r), of x (*rows, i), whose dropout they share."""
        alike = [bank for bank in banks if isinstance(bank, LoRABank) and bank.engine == self.engine]
        if len(alike) < len(banks) or not has_slots(self.engine):
            return []
        down = torch.cat([bank.down for bank in alike], 1)
        hidden = grouped_linear(F.dropout(x, self.dropout, self.training), down, indices, engine=self.engine)
        return list(hidden.split([bank.rank for bank in alike], -1))

    def open_slots(self, x: Tensor, indices: Tensor, onto: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return onto + E_{e_k}(x) for each slot k, (*rows, K, o), by the grouped kernels."""
        if not has_slots(self.engine):
            return super().open_slots(x, indices, onto)
        if hidden is None:
            hidden = grouped_linear(F.dropout(x, self.dropout, self.training), self.down, indices, engine=self.engine)
        scaled = (hidden * self.scaling).unsqueeze(-2)
        out = grouped_sum(scaled, self.up, indices.unsqueeze(-1), engine=self.engine)
        return out.to(onto.dtype).add_(onto.unsqueeze(-2))

    def close_slots(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return Σ_k w_k E_{e_k}(x_k), (*rows, o), of x (*rows, K, i): the slots are summed at rank size."""
        if not has_slots(self.engine):
            return super().close_slots(x, weights, indices)
        x = F.dropout(x, self.dropout, self.training)
        hidden = grouped_linear(x, self.down, indices.unsqueeze(-1), engine=self.engine).squeeze(-2)
        weighted = hidden * (weights * self.scaling).to(hidden.dtype).unsqueeze(-1)
        return grouped_sum(weighted, self.up, indices, engine=self.engine)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"
