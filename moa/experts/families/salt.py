"""Experts in the weight's singular directions: the first values scaled and shifted, a low rank among the rest. SALT."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, low_rank
from ...errors import ConfigError
from ...kernels import low_rank_mixture
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import singular, weight_of
from ..slotwise import mixed_rows


class SALTBank(ExpertBank):
    """E changes of W0 = U Σ V^T in its own directions: ΔW_e = s · (U₁ diag(a_e ⊙ σ₁ + b_e) V₁^T + U₂ X_e Y_e V₂^T).

    U₁, σ₁ and V₁ are the first p of the k triplets, U₂ and V₂ the others.

    | tensor | shape | start |
    |---|---|---|
    | scale (a) | (E, p) | zero |
    | shift (b) | (E, p) | zero |
    | down (Y) | (E, r, k - p) | uniform ±1/√(k - p) |
    | up (X, transposed) | (E, r, k - p) | zero |
    | left (U), right (V^T) | (o, k), (k, i), frozen | W0's, derived again when loading |
    | spectrum (σ₁) | (p,), frozen | W0's, derived again when loading |

    Many rows meet the factors carried into the layer's features, E r k (i + o) a step; few rows go to U and V.

    Args:
        left: U (o, k).
        spectrum: σ (k,), descending.
        right: V^T (k, i).
        n_experts: E.
        n_scaled: p, 1 to k - 1.
        options: rank, scaling and dropout as in `ExpertBank`.

    Source: SALT, arXiv 2503.16055, the method and its released code.
    """

    per_expert = ("scale", "shift", "down", "up")

    left: Tensor
    right: Tensor
    spectrum: Tensor

    def __init__(
        self, left: Tensor, spectrum: Tensor, right: Tensor, n_experts: int, n_scaled: int, **options: Any
    ) -> None:
        super().__init__(right.shape[1], left.shape[0], n_experts, **options)
        self.n_scaled, rest = n_scaled, len(right) - n_scaled
        for name, tensor in (("left", left), ("spectrum", spectrum[:n_scaled].clone()), ("right", right)):
            self.register_buffer(name, tensor, persistent=False)
        self.scale = nn.Parameter(torch.empty(n_experts, n_scaled))
        self.shift = nn.Parameter(torch.empty(n_experts, n_scaled))
        self.down = nn.Parameter(torch.empty(n_experts, self.rank, rest))
        self.up = nn.Parameter(torch.empty(n_experts, self.rank, rest))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw down (E, r, k - p) anew and set scale, shift (E, p) and up (E, r, k - p) to zero."""
        bound = 1 / math.sqrt(self.down.shape[-1])
        nn.init.uniform_(self.down, -bound, bound)
        for parameter in (self.scale, self.shift, self.up):
            nn.init.zeros_(parameter)

    def values(self) -> Tensor:
        """Return what is added to the first singular values, a σ₁ + b, (E, p)."""
        return self.scale * self.spectrum.to(self.scale.dtype) + self.shift

    def tails(self) -> tuple[Tensor, Tensor]:
        """Return Y V₂^T (E, r, i) and X^T U₂^T (E, r, o): the low-rank part as factors of the layer."""
        p, dtype = self.n_scaled, self.down.dtype
        return self.down @ self.right[p:].to(dtype), self.up @ self.left[:, p:].T.to(dtype)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return ΔW_e x, (*rows, o), of x (*rows, i), in the weight's own directions."""
        p, z = self.n_scaled, F.linear(x, self.right.to(x.dtype))  # (*rows, k)
        head = z[..., :p] * self.values()[expert].to(z.dtype)
        tail = F.linear(z[..., p:], self.down[expert].to(z.dtype)) @ self.up[expert].to(z.dtype)
        return F.linear(torch.cat([head, tail], -1), self.left.to(z.dtype)) * self.scaling

    def delta(self, expert: int) -> Delta:
        """Return ΔW_e, (o, i), as factors of rank p + r."""
        p = self.n_scaled
        down, up = (factor[expert].detach() for factor in self.tails())
        head = self.left[:, :p] * self.values()[expert].detach()  # (o, p)
        return low_rank(torch.cat([self.right[:p], down]), torch.cat([head, up.T], 1), self.scaling)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e ΔW_e x, (*rows, o), of x (*rows, i): scaled values are mixed, low ranks go by the kernels."""
        x, p = F.dropout(x, self.dropout, self.training), self.n_scaled
        mixed = mixed_rows(routing, self.values()) * self.scaling  # (*rows, p)
        if x.shape[:-1].numel() >= self.n_experts * self.rank:
            head = F.linear(x, self.right[:p].to(x.dtype))  # (*rows, p)
            head = F.linear(head * mixed.to(head.dtype), self.left[:, :p].to(head.dtype))  # (*rows, o)
            tail = low_rank_mixture(x, *self.tails(), routing.weights, routing.indices, scaling=self.scaling)
            return head + tail
        z = F.linear(x, self.right.to(x.dtype))  # (*rows, k)
        tail = low_rank_mixture(z[..., p:], self.down, self.up, routing.weights, routing.indices, scaling=self.scaling)
        return F.linear(torch.cat([z[..., :p] * mixed.to(z.dtype), tail.to(z.dtype)], -1), self.left.to(z.dtype))

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, n_scaled={self.n_scaled}"


@register_expert("salt", "Elsayed et al. 2025, arXiv 2503.16055")
@dataclass(frozen=True, kw_only=True)
class SALT(Family):
    """Scales and shifts of W0's first singular values, and a low rank among its other directions.

    Args:
        n_scaled: p, how many values are scaled and shifted; on a layer with fewer, all but the last.

    Raises:
        ConfigError: none of them.

    Differs: the released code cuts the changed spectrum at zero, also beside its diagonal, where half of what the low
        rank adds is lost: here experts are linear, and fold. It adds the norms of both parts to the loss: here all
        parts are offsets, which weight decay draws to the base. One of its files draws X and Y, and does not start at
        the base; here X starts at zero, as a LoRA's up. There is no alpha.
    """

    places = ("input",)
    uses = ("rank", "dropout")

    n_scaled: int = 64

    def __post_init__(self) -> None:
        if self.n_scaled < 1:
            raise ConfigError(f"n_scaled must be at least 1, got {self.n_scaled}: without any it is expert='lora'.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with scale, shift (E, p), down and up (E, r, k - p).

        Raises:
            ConfigError: no weight to derive the directions from, or one of a single singular value.
        """
        weight = weight_of(site, self.name)
        k = min(weight.shape)
        if k < 2:
            raise ConfigError(
                f"{site.name}: a weight {tuple(weight.shape)} has one singular value and no rest for a low rank: leave "
                "the layer out of targets."
            )
        left, spectrum, right = singular(weight, k)
        return SALTBank(left, spectrum, right, n_experts, min(self.n_scaled, k - 1), **options)
