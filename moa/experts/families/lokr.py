"""Kronecker experts, LoKr. Yeh et al. 2023 (LyCORIS), arXiv 2309.14859."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import Site
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import divides
from ..structured import StructuredBank, Tensors, few_for


class LoKrBank(StructuredBank):
    """E Kronecker products: ΔW_e = s · C_e ⊗ D_e with D_e = U_e V_e, or D_e whole where r is not small.

    | parameter | shape | start |
    |---|---|---|
    | left (C) | (E, o₁, i₁) | zero |
    | right (D) | (E, o₂, i₂), where r ≥ max(o₂, i₂) / 2 | uniform ±1/√i₂ |
    | right_up (U), right_down (V) | (E, o₂, r), (E, r, i₂), else | uniform ±1/√r, ±1/√i₂ |

    Args:
        d_in: i = i₁ i₂.
        d_out: o = o₁ o₂.
        n_experts: E.
        inner: (i₁, i₂).
        outer: (o₁, o₂).
        options: rank, scaling, dropout as in `ExpertBank`.

    Source: arXiv 2309.14859, §3.3.
    """

    def __init__(
        self, d_in: int, d_out: int, n_experts: int, inner: tuple[int, int], outer: tuple[int, int], **options: Any
    ) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.inner, self.outer = inner, outer
        self.few, self.few_alone = few_for(d_in * outer[1] + inner[0] * d_out, 1, d_in, d_out)
        self.left = nn.Parameter(torch.empty(n_experts, outer[0], inner[0]))
        self.whole_right = self.rank >= max(outer[1], inner[1]) / 2
        if self.whole_right:
            self.right = nn.Parameter(torch.empty(n_experts, outer[1], inner[1]))
        else:
            self.right_up = nn.Parameter(torch.empty(n_experts, outer[1], self.rank))
            self.right_down = nn.Parameter(torch.empty(n_experts, self.rank, inner[1]))
        self.reset_parameters()

    @property
    def per_expert(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the factors (E, …)."""
        return ("left", "right") if self.whole_right else ("left", "right_up", "right_down")

    def reset_parameters(self) -> None:
        """Set left (E, o₁, i₁) to zero and draw the right factors (E, …) anew."""
        nn.init.zeros_(self.left)
        for name in self.per_expert[1:]:
            factor = getattr(self, name)
            nn.init.uniform_(factor, -1 / math.sqrt(factor.shape[-1]), 1 / math.sqrt(factor.shape[-1]))

    def _right(self, tensors: Tensors) -> Tensor:
        return tensors["right"] if self.whole_right else tensors["right_up"] @ tensors["right_down"]

    def change(self, tensors: Tensors) -> Tensor:
        """Return s · C ⊗ D, (o, i), of one expert."""
        return torch.kron(tensors["left"], self._right(tensors)) * self.scaling

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return s · (C ⊗ D) x, (*rows, o), of x (*rows, i), block by block: the product is never formed."""
        blocks = x.reshape(*x.shape[:-1], *self.inner)  # (*rows, i₁, i₂)
        right = self._right(tensors).to(x.dtype)
        out = (tensors["left"].to(x.dtype) * self.scaling) @ (blocks @ right.mT)  # (*rows, o₁, o₂)
        return out.flatten(-2)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, inner={self.inner}, outer={self.outer}"


def factor_pair(size: int, factor: int) -> tuple[int, int]:
    """Return (p, q) with p q = size and p ≤ q: p is the factor, or with -1 the largest divisor up to √size."""
    if factor > 0:
        return factor, size // factor
    first = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return first, size // first


@register_expert("lokr", "Yeh et al. 2023, arXiv 2309.14859")
@dataclass(frozen=True, kw_only=True)
class LoKr(Family):
    """A Kronecker product of a small matrix and a larger one, the larger of low rank.

    Args:
        factor: features of the small matrix, dividing those of every layer; -1 is the divisor next to their root.

    Raises:
        ConfigError: a factor of 0 or below -1.
    """

    uses = ("rank", "alpha", "dropout")

    factor: int = -1

    def __post_init__(self) -> None:
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(f"factor must be -1 or at least 1, got {self.factor}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with left (E, o₁, i₁) and its right factors.

        Raises:
            ConfigError: the factor does not divide a side of the layer; the nearest that do are named.
        """
        if self.factor > 0:
            for size in (site.d_in, site.d_out):
                divides("factor", self.factor, size, site.name)
        inner, outer = factor_pair(site.d_in, self.factor), factor_pair(site.d_out, self.factor)
        return LoKrBank(site.d_in, site.d_out, n_experts, inner, outer, **options)
