"""LoRA experts that share one down projection. Tian et al. 2024 (HydraLoRA), arXiv 2404.19245."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..delta import Delta, low_rank
from ..layers import Site
from ..types import Routing
from .bank import Axes, ExpertBank
from .family import Family, register_expert


class SharedLoRABank(ExpertBank):
    """E up projections behind one down projection: E_e(x) = s · (x down^T) up_e.

    | parameter | shape | start |
    |---|---|---|
    | down (A) | (1, r, i) | uniform ±1/√i |
    | up (B, transposed) | (E, r, o) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        options: rank, scaling, dropout as in `ExpertBank`.

    Source: arXiv 2404.19245, eq. 4-5.
    """

    equal_at_init = True
    per_expert = ("up",)
    axes: ClassVar[Axes] = {"down": "in", "up": "out"}

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.down = nn.Parameter(torch.empty(1, self.rank, d_in))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (1, r, i) anew and set up (E, r, o) to zero."""
        bound = 1 / math.sqrt(self.d_in)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · (x down^T) up_e, (*rows, o), of x (*rows, i)."""
        return F.linear(x, self.down[0].to(x.dtype)) @ self.up[expert].to(x.dtype) * self.scaling

    def delta(self, expert: int) -> Delta:
        """Return s · up_e^T down, (o, i), as factors."""
        return low_rank(self.down[0].detach(), self.up[expert].detach().T, self.scaling)

    @torch.no_grad()
    def mixed_delta(self, weights: Tensor) -> Delta:
        """Return s · (Σ_e w_e up_e)^T down, (o, i), of rank r, of weights (E,)."""
        up = torch.einsum("e,ero->or", weights, self.up.to(weights.dtype))  # (o, r)
        return low_rank(self.down[0].to(weights.dtype), up, self.scaling)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i): one product down, one up over all experts' ranks."""
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, self.down[0].to(x.dtype))  # (*rows, r)
        weights = (routing.dense() * self.scaling).to(hidden.dtype)  # (*rows, E)
        spread = (weights.unsqueeze(-1) * hidden.unsqueeze(-2)).flatten(-2)  # (*rows, E r)
        return spread @ self.up.to(hidden.dtype).flatten(0, 1)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


@register_expert("shared", "Tian et al. 2024, arXiv 2404.19245")
@dataclass(frozen=True, kw_only=True)
class Shared(Family):
    """One down projection for all experts of a layer, an up projection each."""

    uses = ("rank", "alpha", "dropout")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (1, r, i) and up (E, r, o)."""
        return SharedLoRABank(site.d_in, site.d_out, n_experts, **options)
