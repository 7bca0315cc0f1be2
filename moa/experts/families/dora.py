"""DoRA experts: a weight's direction of low rank, its length a vector. Liu et al. 2024, arXiv 2402.09353."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, Dense
from ...kernels import low_rank_mixture
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import weight_of
from ..fused import Fused
from ..slotwise import slots


class DoRABank(ExpertBank):
    """E whole weights: W_e = m_e ⊙ V_e / ‖V_e‖ with V_e = W0 + s · up_e^T down_e, norms over each row; ΔW_e = W_e - W0.

    | parameter | shape | start |
    |---|---|---|
    | down (A) | (E, r, i) | uniform ±1/√i |
    | up (B, transposed) | (E, r, o) | zero |
    | magnitude (m) | (E, o) | ‖W0‖ of each row |

    Args:
        site: the layer, whose weight W0 (o, i) is read where it is used and never stored.
        n_experts: E.
        options: rank, scaling, dropout as in `ExpertBank`.

    Source: arXiv 2402.09353, eq. 5; the norm counts as a constant in the backward pass (§4.3).
    """

    whole = True
    per_expert: ClassVar[tuple[str, ...]] = ("down", "up", "magnitude")

    def __init__(self, site: Site, n_experts: int, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.site = site
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, self.d_in))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, self.d_out))
        self.magnitude = nn.Parameter(torch.empty(n_experts, self.d_out))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew, set up (E, r, o) to zero and magnitude (E, o) to the weight's own."""
        bound = 1 / math.sqrt(self.d_in)
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)
        own = weight_of(self.site, "dora").to(self.magnitude)
        self.magnitude.copy_(own.square().sum(1).sqrt().expand_as(self.magnitude))  # as `lengths` has it, to the bit

    def lengths(self) -> Tensor:
        """Return m_e / ‖V_e‖, (E, o), the norm of each row from those of its parts: no V_e (o, i) is formed."""
        with torch.no_grad():
            dtype = torch.promote_types(self.down.dtype, torch.float32)  # what is left of a difference
            weight, down, up = self.site.weight().to(dtype), self.down.to(dtype), self.up.to(dtype) * self.scaling
            across = (down.flatten(0, 1) @ weight.T).view_as(up)  # down W0^T
            within = down @ down.mT  # (E, r, r)
            moved = 2 * (up * across).sum(1) + (up * (within @ up)).sum(1)  # ‖V_e‖² - ‖W0‖²
            norms = (weight.square().sum(1) + moved).clamp(min=0).sqrt()
        return self.magnitude / norms.to(self.magnitude.dtype)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return W_e x - W0 x, (*rows, o), of x (*rows, i)."""
        base = F.linear(x, self.site.weight().detach().to(x.dtype))
        low = F.linear(x, self.down[expert].to(x.dtype)) @ self.up[expert].to(x.dtype) * self.scaling
        return (base + low) * self.lengths()[expert].to(x.dtype) - base

    @torch.no_grad()
    def delta(self, expert: int) -> Delta:
        """Return W_e - W0, (o, i)."""
        weight = self.site.weight().to(self.down.dtype)
        moved = weight + (self.up[expert].T * self.scaling) @ self.down[expert]
        return Dense(self.lengths()[expert].unsqueeze(1) * moved - weight)

    def parts(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return Σ_e w_e (m_e / ‖V_e‖ - 1), which multiplies W0 x, (*rows, o), and what the factors add, (*rows, o).

        Args:
            x: (*rows, i).
            routing: whose rows broadcast against x's.
        """
        lengths = self.lengths()
        scale = torch.zeros((), dtype=lengths.dtype, device=lengths.device)
        for weight, (own,) in slots(routing, lengths - 1):
            scale = scale + weight.to(own.dtype) * own
        up = self.up * lengths.unsqueeze(1)  # (E, r, o)
        low = low_rank_mixture(x, self.down, up, routing.weights, routing.indices, scaling=self.scaling)
        return scale, low

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e (W_e - W0) x, (*rows, o), of x (*rows, i)."""
        x = F.dropout(x, self.dropout, self.training)
        scale, low = self.parts(x, routing)
        base = F.linear(x, self.site.weight().detach().to(x.dtype))
        return base * scale.to(base.dtype) + low.to(base.dtype)

    @property
    def fused(self) -> FusedDirections:
        """One product with W0 for the base and the experts, on rows (*rows, i)."""
        return FusedDirections(self)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


class FusedDirections(Fused):
    """W0 x + b + Σ_e w_e (W_e - W0) x on rows (*rows, i)."""

    __slots__ = ()

    bank: DoRABank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return base and mixture together, (*rows, o)."""
        if self.bank.training and self.bank.dropout:
            return super().add_linear(x, routing, weight, bias)
        scale, low = self.bank.parts(x, routing)
        base = F.linear(x, weight)
        y = torch.addcmul(low.to(base.dtype), base, 1 + scale.to(base.dtype))
        return y if bias is None else y + bias


@register_expert("dora", "Liu et al. 2024, arXiv 2402.09353")
@dataclass(frozen=True, kw_only=True)
class DoRA(Family):
    """A whole weight of a new direction and length, for a routing that is constant, by task or by example."""

    places = ("input",)
    uses = ("rank", "alpha", "dropout")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i), up (E, r, o) and magnitude (E, o).

        Raises:
            ConfigError: no weight to start from.
        """
        weight_of(site, self.name)
        return DoRABank(site, n_experts, **options)
