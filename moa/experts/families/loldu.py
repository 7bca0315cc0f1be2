"""Experts that are a diagonal between the weight's own triangles. LoLDU, Shi et al. 2024, arXiv 2410.13618."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, low_rank
from ...errors import ConfigError
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import weight_of
from ..slotwise import mixed_rows


class LoLDUBank(ExpertBank):
    """E diagonals between the first r columns and rows of W0 = P L D U: E_e(x) = s · P L_r (z_e ⊙ (U_r x)).

    | tensor | shape | start |
    |---|---|---|
    | diagonal (z - D_r) | (E, r) | zero |
    | down (U_r, of unit diagonal) | (r, i), frozen | W0's, derived again when loading |
    | up (P L_r) | (o, r), frozen | W0's, derived again when loading |

    Args:
        down: U_r (r, i).
        up: P L_r (o, r).
        n_experts: E.
        options: scaling and dropout as in `ExpertBank`.

    Source: arXiv 2410.13618, figure 3: W0 - s P L_r D_r U_r + s P L_r diag(z) U_r with z = D_r at first.
    Differs: z - D_r is stored, so that the base stays as it is for any number of experts, and weight decay draws to it.
    """

    equal_at_init = True
    per_expert = ("diagonal",)
    averages = True

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, n_experts: int, **options: Any) -> None:
        super().__init__(down.shape[1], up.shape[0], n_experts, **{**options, "rank": down.shape[0]})
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.diagonal = nn.Parameter(torch.zeros(n_experts, self.rank))

    def reset_parameters(self) -> None:
        """Set the diagonals (E, r) to zero; the triangles stay."""
        nn.init.zeros_(self.diagonal)

    def _between(self, x: Tensor, diagonal: Tensor) -> Tensor:
        """Return s · P L_r (z ⊙ (U_r x)), (*rows, o), of x (*rows, i) and z (r,) or (*rows, r)."""
        hidden = F.linear(x, self.down.to(x.dtype))  # (*rows, r)
        return F.linear(hidden * (diagonal * self.scaling).to(hidden.dtype), self.up.to(hidden.dtype))

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · P L_r (z_e ⊙ (U_r x)), (*rows, o), of x (*rows, i)."""
        return self._between(x, self.diagonal[expert])

    def delta(self, expert: int) -> Delta:
        """Return s · P L_r diag(z_e) U_r, (o, i), as factors."""
        return low_rank(self.down, self.up * self.diagonal[expert].detach(), self.scaling)

    @torch.no_grad()
    def mixed_delta(self, weights: Tensor) -> Delta:
        """Return s · P L_r diag(Σ_e w_e z_e) U_r, (o, i), of rank r, of weights (E,)."""
        diagonal = weights @ self.diagonal.to(weights.dtype)
        return low_rank(self.down.to(weights.dtype), self.up.to(weights.dtype) * diagonal, self.scaling)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i): as many products as one expert has."""
        return self._between(F.dropout(x, self.dropout, self.training), mixed_rows(routing, self.diagonal))

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


def triangles(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return P L_r (o, r), D_r (r,) and U_r (r, i) of W = P L D U (o, i), the diagonals of L and U being 1.

    Raises:
        ConfigError: r is above min(o, i), or a pivot is zero to rounding, by which U cannot be divided.
    """
    k = min(weight.shape)
    if rank > k:
        raise ConfigError(f"a weight {tuple(weight.shape)} has {k} pivots: rank={rank} is too many.")
    p, lower, upper = torch.linalg.lu(weight)
    pivots = upper.diagonal()
    floor = max(weight.shape) * torch.finfo(weight.dtype).eps * float(pivots.abs().max())
    tiny = (pivots[:rank].abs() <= floor).nonzero().flatten().tolist()
    if tiny:
        fits = f"at most rank={tiny[0]} fits" if tiny[0] else "leave the layer out of targets"
        raise ConfigError(
            f"pivot {tiny[0]} of a weight {tuple(weight.shape)} is {float(pivots[tiny[0]]):.3g}, zero to rounding "
            f"beside the largest, {float(pivots.abs().max()):.3g}, and nothing can be divided by it: {fits}."
        )
    pivots = pivots[:rank]
    return (p @ lower[:, :rank]).contiguous(), pivots, upper[:rank] / pivots.unsqueeze(1)


@register_expert("loldu", "Shi et al. 2024, arXiv 2410.13618")
@dataclass(frozen=True, kw_only=True)
class LoLDU(Family):
    """A diagonal of r numbers between the weight's own lower and upper triangle, which all experts of a layer share.

    Raises:
        ConfigError: as `build`.

    Differs: the released code takes r = 768, all of a layer's pivots, and has starts that leave the base. It says that
        the scale is trained, and does not train it: nor is it here.
    """

    places = ("input",)
    uses = ("rank", "alpha", "dropout")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with diagonals (E, r).

        Raises:
            ConfigError: no weight to derive the triangles from, a rank above its pivots, or a pivot that is zero to
                rounding; the layer and the rank that fits are named.
        """
        weight = weight_of(site, self.name)
        try:
            up, _, down = triangles(weight, options["rank"])
        except ConfigError as error:
            raise ConfigError(f"{site.name}: {error}") from error
        return LoLDUBank(down, up, n_experts, **options)
