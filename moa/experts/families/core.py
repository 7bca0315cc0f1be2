"""Core experts: a small square between frozen bases that all share. LoRA-XS, arXiv 2405.17604; LoRA-SB, 2411.19557."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, low_rank
from ...errors import ConfigError
from ...kernels import grouped_linear
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import singular, weight_of


class CoreBank(ExpertBank):
    """E cores between one frozen pair of bases: E_e(x) = s · B (R_e (A x)).

    | tensor | shape | start |
    |---|---|---|
    | core (R) | (E, r, r) | zero |
    | down (A) | (r, i), frozen | orthonormal rows |
    | up (B) | (o, r), frozen | orthonormal columns |

    Args:
        down: A (r, i).
        up: B (o, r).
        n_experts: E.
        stored: the bases go into a checkpoint: the base's weight does not give them again.
        options: rank, scaling, dropout and engine as in `ExpertBank`.

    Source: arXiv 2405.17604, §3; arXiv 2411.19557, eq. 3, for orthonormal bases.
    Differs: LoRA-XS multiplies one basis by the singular values, and draws R from N(0, 10⁻¹⁰); with orthonormal bases
        the gradient of R is that of the weight, projected, whatever the layer's singular values are.
    """

    equal_at_init = True
    per_expert = ("core",)
    averages = True

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor, n_experts: int, stored: bool = False, **options: Any) -> None:
        super().__init__(down.shape[1], up.shape[0], n_experts, **{**options, "rank": down.shape[0]})
        self.register_buffer("down", down, persistent=stored)
        self.register_buffer("up", up, persistent=stored)
        self.core = nn.Parameter(torch.zeros(n_experts, self.rank, self.rank))

    def reset_parameters(self) -> None:
        """Set the cores (E, r, r) to zero; the bases stay."""
        nn.init.zeros_(self.core)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · B (R_e (A x)), (*rows, o), of x (*rows, i)."""
        hidden = F.linear(F.linear(x, self.down.to(x.dtype)), self.core[expert].to(x.dtype))
        return F.linear(hidden, self.up.to(x.dtype)) * self.scaling

    def delta(self, expert: int) -> Delta:
        """Return s · B R_e A, (o, i), as factors."""
        return low_rank(self.core[expert].detach() @ self.down, self.up, self.scaling)

    @torch.no_grad()
    def mixed_delta(self, weights: Tensor) -> Delta:
        """Return s · B (Σ_e w_e R_e) A, (o, i), of rank r, of weights (E,)."""
        core = torch.einsum("e,eqr->qr", weights, self.core.to(weights.dtype))
        return low_rank(core @ self.down.to(weights.dtype), self.up.to(weights.dtype), self.scaling)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i): one product down, one up, and the chosen cores."""
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.down.to(x.dtype))  # (*rows, r)
        weights = (routing.weights * self.scaling).to(hidden.dtype).unsqueeze(-1)  # (*rows, K, 1)
        if routing.indices is None:
            spread = (weights * hidden.unsqueeze(-2)).flatten(-2)  # (*rows, E r)
            middle = spread @ self.core.to(hidden.dtype).mT.flatten(0, 1)
        else:
            indices = routing.indices.expand(*hidden.shape[:-1], routing.k)
            slots = grouped_linear(hidden, self.core, indices, engine=self.engine)  # (*rows, K, r)
            middle = (slots * weights).sum(-2)
        return F.linear(middle, self.up.to(middle.dtype))

    @property
    def starts(self) -> tuple[str, ...]:
        """Where the bases (r, i), (o, r) can start: nowhere else where the base's weight must give them again."""
        return () if "down" in self._non_persistent_buffers_set else ("lora-sb",)

    @torch.no_grad()
    def begin_at(self, method: str, start: Tensor) -> None:
        """Let bases and cores start at an update (o, i): s · B R_e A is the sum of its r largest singular triplets."""
        up, values, down = singular(start, self.rank)
        self.up.copy_(up)
        self.down.copy_(down)
        self.core.copy_((values / self.scaling).diag())

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


@register_expert("core", "Bałazy et al. 2024, arXiv 2405.17604; Ponkshe et al. 2024, arXiv 2411.19557")
@dataclass(frozen=True, kw_only=True)
class Core(Family):
    """An r × r core between the weight's own singular vectors, which all experts of a layer share.

    Args:
        save_bases: store the bases, where they are not to be derived from the base's weight again when loading.
    """

    places = ("input",)
    uses = ("rank", "alpha", "dropout")

    save_bases: bool = False

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with core (E, r, r).

        Raises:
            ConfigError: no weight to derive the bases from, or a rank above its singular values.
        """
        try:
            up, _, down = singular(weight_of(site, self.name), options["rank"])
        except ConfigError as error:
            raise ConfigError(str(error) if site.name in str(error) else f"{site.name}: {error}") from error
        return CoreBank(down, up, n_experts, self.save_bases, **options)
