"""LoRA experts with a bias after each factor. Kim et al. 2023 (Hydra), arXiv 2309.06922."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import has_slots
from ..types import Routing
from .lora import LoRABank


class AffineLoRABank(LoRABank):
    """E low-rank experts with biases: E_e(x) = s · ((x down_e^T + a_e) up_e + c_e).

    | parameter | shape | start |
    |---|---|---|
    | down, up | as `LoRABank` | as `LoRABank` |
    | down_bias (a) | (E, r) | zero |
    | up_bias (c) | (E, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        options: as in `ExpertBank`.
    """

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.down_bias = nn.Parameter(torch.zeros(n_experts, self.rank))
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_out))

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew; up (E, r, o) and the biases are zero."""
        super().reset_parameters()
        if hasattr(self, "up_bias"):  # not yet during construction
            nn.init.zeros_(self.down_bias)
            nn.init.zeros_(self.up_bias)

    def shifts(self) -> Tensor:
        """Return what every expert adds whatever x is, s · (a_e up_e + c_e), (E, o)."""
        return (torch.einsum("er,ero->eo", self.down_bias, self.up) + self.up_bias) * self.scaling

    def shift(self, expert: int) -> Tensor:
        """Return s · (a_e up_e + c_e), (o,)."""
        return self.shifts()[expert]

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · ((x down_e^T + a_e) up_e + c_e), (*rows, o), of x (*rows, i)."""
        return super().expert_forward(x, expert) + self.shift(expert).to(x.dtype)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i)."""
        return self._shifted(super().forward(x, routing), routing)

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b + Σ_e w_e E_e(x), (*rows, o)."""
        y = super().add_linear(x, routing, weight, bias)
        if self.training and self.dropout:  # the base class went through forward
            return y
        return self._shifted(y, routing)

    def add_gated(
        self, x: Tensor, gate: Tensor, k: int, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Return base and mixture (*rows, o), logits, weights and indices, or None."""
        found = super().add_gated(x, gate, k, weight, bias)
        if found is None:
            return None
        y, logits, weights, indices = found
        return self._shifted(y, Routing(weights, indices, self.n_experts)), logits, weights, indices

    def _shifted(self, y: Tensor, routing: Routing) -> Tensor:
        """Return y (*rows, o) with the experts' constants, weighted by the routing."""
        return y + routing.dense().to(y.dtype) @ self.shifts().to(y.dtype)

    def open_slots(self, x: Tensor, indices: Tensor, onto: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return onto + E_{e_k}(x) for each slot k, (*rows, K, o)."""
        y = super().open_slots(x, indices, onto, hidden)
        return y + self.shifts().to(y.dtype)[indices] if has_slots(self.engine) else y  # else through forward

    def close_slots(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return Σ_k w_k E_{e_k}(x_k), (*rows, o), of x (*rows, K, i)."""
        y = super().close_slots(x, weights, indices)
        if not has_slots(self.engine):  # the base class went through forward
            return y
        return y + (self.shifts()[indices] * weights.unsqueeze(-1)).sum(-2).to(y.dtype)
