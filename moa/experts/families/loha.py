"""Hadamard experts, LoHa: the entrywise product of two low ranks. Hyeon-Woo et al. 2021 (FedPara), arXiv 2108.06098."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers import Site
from ..bank import Axes, ExpertBank
from ..family import Family, register_expert
from ..structured import StructuredBank, Tensors, few_for


class LoHaBank(StructuredBank):
    """E entrywise products: ΔW_e = s · (U_e V_e) ⊙ (U'_e V'_e), of rank up to r².

    | parameter | shape | start |
    |---|---|---|
    | left_up (U), right_up (U') | (E, o, r) | uniform ±1/√r |
    | left_down (V) | (E, r, i) | uniform ±1/√i |
    | right_down (V') | (E, r, i) | zero |

    Args:
        d_in: i.
        d_out: o.
        n_experts: E.
        options: rank, scaling, dropout as in `ExpertBank`.

    Source: arXiv 2108.06098, eq. 2; arXiv 2309.14859, §3.2.
    """

    per_expert: ClassVar[tuple[str, ...]] = ("left_up", "left_down", "right_up", "right_down")
    axes: ClassVar[Axes] = {
        "left_up": "out",
        "left_down": "in",
        "right_up": "out",
        "right_down": "in",
    }

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        for name in self.per_expert:
            shape = (d_out, self.rank) if name.endswith("up") else (self.rank, d_in)
            setattr(self, name, nn.Parameter(torch.empty(n_experts, *shape)))
        self.few, self.few_alone = few_for(self.rank**2 * (d_in + d_out), 2 * self.rank, d_in, d_out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the factors (E, …) anew; right_down (E, r, i) is zero."""
        for name in self.per_expert:
            factor = getattr(self, name)
            bound = 0.0 if name == "right_down" else 1 / math.sqrt(factor.shape[-1])
            nn.init.uniform_(factor, -bound, bound)

    def change(self, tensors: Tensors) -> Tensor:
        """Return s · (U V) ⊙ (U' V'), (o, i), of one expert."""
        left = tensors["left_up"] @ tensors["left_down"]
        return left * (tensors["right_up"] @ tensors["right_down"]) * self.scaling

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of x (*rows, i), by the r² pairs of components."""
        up = tensors["left_up"].unsqueeze(2) * tensors["right_up"].unsqueeze(1)  # (o, r, r)
        down = tensors["left_down"].unsqueeze(1) * tensors["right_down"]  # (r, r, i)
        hidden = F.linear(x, down.flatten(0, 1).to(x.dtype)) * self.scaling  # (*rows, r²)
        return F.linear(hidden, up.flatten(1).to(x.dtype))

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


@register_expert("loha", "Hyeon-Woo et al. 2021, arXiv 2108.06098")
@dataclass(frozen=True, kw_only=True)
class LoHa(Family):
    """The entrywise product of two low-rank matrices."""

    uses = ("rank", "alpha", "dropout")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with two pairs of factors (E, o, r) and (E, r, i)."""
        return LoHaBank(site.d_in, site.d_out, n_experts, **options)
