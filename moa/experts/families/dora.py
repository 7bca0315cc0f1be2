"""DoRA experts: a weight's direction of low rank, its length a vector. Liu et al. 2024, arXiv 2402.09353."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...layers import Site
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import weight_of
from ..structured import StructuredBank, Tensors


class DoRABank(StructuredBank):
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
        self.magnitude.copy_(own.norm(dim=1).expand_as(self.magnitude))

    def change(self, tensors: Tensors) -> Tensor:
        """Return W_e - W0, (o, i), of one expert."""
        weight = self.site.weight().detach().to(tensors["down"].dtype)
        moved = weight + (tensors["up"].mT * self.scaling) @ tensors["down"]
        length = moved.detach().norm(dim=1)
        return (tensors["magnitude"] / length).unsqueeze(1) * moved - weight

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


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
