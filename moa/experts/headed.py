"""LoRA experts mixed in parameter space, head by head. Ponti et al. 2022 (Poly), Caccia et al. 2023 (MHR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..delta import Delta, low_rank
from ..errors import ConfigError
from ..kernels import headed_linear
from ..layers import Site
from ..types import Routing
from .bank import Axes, ExpertBank
from .factored import read_factors
from .family import Family, register_expert
from .fused import Fused


class HeadedLoRABank(ExpertBank):
    """The LoRA whose factors are the weighted sums of E LoRAs' factors: y = s · (x A_w^T) B_w.

    A_w = concat_h Σ_e w_{h,e} A_{e,h};  B_w = concat_h Σ_e w_{h,e} B_{e,h}

    The features are cut into H heads, each with weights of its own; w is shared by A and B, so the product has cross
    terms between experts: this is not Σ_e w_e E_e(x).

    | parameter | shape | start |
    |---|---|---|
    | down (A) | (E, r, i) | uniform ±1/√(3 i), as the authors' code |
    | up (B, transposed) | (E, r, o) | zero |

    A routing's rows are (*rows, H), the head being one more row axis; one without it serves every head alike. A
    routing per example is mixed once per example and never expanded to tokens; with a routing per token the sums go
    over the experts' rank-sized products instead of over their factors.

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        n_heads: H, dividing both i and o.
        options: rank, scaling, dropout as in `ExpertBank`.

    Raises:
        ConfigError: H does not divide i and o.
    Source: arXiv 2211.03831, §3.
    Differs: peft starts A larger by √(3 H).
    """

    mixes = "parameters"
    per_expert = ("down", "up")

    def __init__(self, d_in: int, d_out: int, n_experts: int, *, n_heads: int = 1, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        if n_heads < 1 or d_in % n_heads or d_out % n_heads:
            raise ConfigError(
                f"n_heads={n_heads} must divide the features of every layer it is for, and this one is "
                f"{d_in} -> {d_out}."
            )
        self.n_heads = n_heads
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, d_in))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, d_out))
        self.reset_parameters()

    @property
    def axes(self) -> Axes:  # type: ignore[override]
        """Whose features the factors (E, r, i) and (E, r, o) have; with several heads a feature's place says which."""
        return {"down": "in", "up": "out"} if self.n_heads == 1 else {}

    def reset_parameters(self) -> None:
        """Draw down (E, r, i) anew and set up (E, r, o) to zero."""
        bound = (3 * self.d_in) ** -0.5
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · (x down_e^T) up_e, (*rows, o), of x (*rows, i)."""
        return F.linear(x, self.down[expert].to(x.dtype)) @ self.up[expert].to(x.dtype) * self.scaling

    def delta(self, expert: int) -> Delta:
        """Return s · up_e^T down_e, (o, i), as factors."""
        return low_rank(self.down[expert].detach(), self.up[expert].detach().T, self.scaling)

    @torch.no_grad()
    def mixed_delta(self, weights: Tensor) -> Delta:
        """Return s · B_w^T A_w, (o, i), of weights (E,) or (H, E): the factors are averaged, not their products."""
        dtype = torch.promote_types(weights.dtype, self.down.dtype)
        per_head = (weights if weights.ndim == 2 else weights.unsqueeze(0)).to(dtype)  # (H or 1, E)
        down, up = self._mix(per_head, self.down.to(dtype)), self._mix(per_head, self.up.to(dtype))
        return low_rank(down, up.T, self.scaling)

    def read(self, expert: int, change: Delta) -> None:
        """Make one expert a low-rank change (o, i).

        Raises:
            ConfigError: it is not low-rank, its rank is above r, or it is for another layer.
        """
        read_factors(change, self.down[expert], self.up[expert], self.scaling)

    def mixed(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed factors A_w (*rows, r, i) and B_w (*rows, r, o) for weights (*rows, H or 1, E)."""
        return self._mix(weights, self.down), self._mix(weights, self.up)

    def _mix(self, weights: Tensor, factor: Tensor) -> Tensor:
        """Return a mixed factor (*rows, r, d) of weights (*rows, H or 1, E) and the experts' (E, r, d)."""
        weights = weights.to(factor.dtype)
        if weights.shape[-2] == 1:
            flat = weights.squeeze(-2) @ factor.view(self.n_experts, -1)  # (*rows, r · d)
            return flat.view(*flat.shape[:-1], self.rank, factor.shape[-1])
        per_head = rearrange(factor, "e r (h d) -> e r h d", h=self.n_heads)  # d features of each head
        return rearrange(torch.einsum("...he,erhd->...rhd", weights, per_head), "... r h d -> ... r (h d)")

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the mixed expert's output (*rows, o) on x (*rows, i)."""
        weights = routing.dense()  # (*rows, E) or (*rows, H, E)
        if weights.ndim <= x.ndim:
            weights = weights.unsqueeze(-2)  # (*rows, 1, E): all heads alike
        x = F.dropout(x, self.dropout, self.training)
        if weights.ndim > 2 and weights.shape[-3] != 1:
            return self._per_row(x, weights)
        if weights.ndim > 2:  # the last row axis, tokens, shares one mixture
            weights = weights.squeeze(-3)
        down, up = self.mixed(weights)  # (B, r, i), (B, r, o), or without B where constant
        return (x @ down.to(x.dtype).mT * self.scaling) @ up.to(x.dtype)

    def _per_row(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the same for weights (*rows, H, E) that differ from token to token."""
        heads = weights.shape[-2]
        weights = weights.to(x.dtype)
        by_head = "e r (h d) -> e r h d"
        down = rearrange(self.down.to(x.dtype), by_head, h=heads)
        hidden = torch.einsum("...hd,erhd->...her", rearrange(x, "... (h d) -> ... h d", h=heads), down)
        hidden = torch.einsum("...her,...he->...r", hidden, weights)  # (*rows, r)
        up = rearrange(self.up.to(x.dtype), by_head, h=heads)
        out = torch.einsum("...r,...he,erhd->...hd", hidden, weights, up)  # (*rows, H, o / H)
        return rearrange(out, "... h d -> ... (h d)") * self.scaling

    @property
    def fused(self) -> FusedHeads:
        """The base and one mixed expert per example in one step, on rows (B, S, i)."""
        return FusedHeads(self)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, n_heads={self.n_heads}, scaling={self.scaling:g}"


class FusedHeads(Fused):
    """The base and the mixed expert on rows (B, S, i) in one node of the graph, where each example has one mixture."""

    __slots__ = ()

    bank: HeadedLoRABank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b and the mixed expert's output, (*rows, o); in one step where there is one per example."""
        bank = self.bank
        weights = routing.dense()  # (*rows, E) or (*rows, H, E)
        if weights.ndim <= x.ndim:
            weights = weights.unsqueeze(-2)
        per_example = x.ndim == 3 and weights.ndim == 4 and weights.shape[:2] == (x.shape[0], 1)
        cast = torch.is_autocast_enabled(x.device.type) or x.dtype != weight.dtype
        if not per_example or cast or (bank.training and bank.dropout):
            return super().add_linear(x, routing, weight, bias)
        mix = weights.squeeze(1).to(bank.down.dtype)  # (B, H, E)
        return headed_linear(x, weight, bias, bank.down, bank.up, mix, bank.scaling)


@register_expert("headed", "Caccia et al. 2023, arXiv 2211.03831")
@dataclass(frozen=True, kw_only=True)
class Headed(Family):
    """LoRAs whose factors are mixed, not their outputs, head by head.

    Args:
        n_heads: H, dividing the features of every layer.
    """

    uses = ("rank", "alpha", "dropout")

    n_heads: int = 1

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, r, i) and up (E, r, o).

        Raises:
            ConfigError: H does not divide the site's features.
        """
        try:
            return HeadedLoRABank(site.d_in, site.d_out, n_experts, n_heads=self.n_heads, **options)
        except ConfigError as error:
            raise ConfigError(f"{site.name}: {error}") from error
