"""Sums of Kronecker products that start at the base's own. SoKA, Chong and Qu 2025, arXiv 2506.15251."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import Site
from ...spectrum import rank_at_elbow, rank_for_energy
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import divides, singular, weight_of
from ..structured import StructuredBank, Tensors, few_for
from .lokr import factor_pair


class SoKABank(StructuredBank):
    """E sums of r Kronecker products, without the base's own: ΔW_e = s · Σ_j (A_{e,j} ⊗ B_{e,j} - A⁰_j ⊗ B⁰_j).

    | tensor | shape | start |
    |---|---|---|
    | left (A - A⁰) | (E, r, o₁, i₁) | zero |
    | right (B - B⁰) | (E, r, o₂, i₂) | zero |
    | left_start (A⁰), right_start (B⁰) | (r, o₁, i₁), (r, o₂, i₂), frozen | W0's, derived again when loading |

    A ⊗ B - A⁰ ⊗ B⁰ = (A - A⁰) ⊗ B + A⁰ ⊗ (B - B⁰), so that it is exactly zero at the start, and the base stays.

    Args:
        left_start: A⁰ (r, o₁, i₁).
        right_start: B⁰ (r, o₂, i₂).
        n_experts: E.
        options: scaling and dropout as in `ExpertBank`.

    Source: arXiv 2506.15251, the Kronecker-product SVD: W0 ≈ Σ_j σ_j U_j ⊗ V_j with A⁰_j = √σ_j U_j, B⁰_j = √σ_j V_j.
    """

    equal_at_init = True
    per_expert: ClassVar[tuple[str, ...]] = ("left", "right")

    left_start: Tensor
    right_start: Tensor

    def __init__(self, left_start: Tensor, right_start: Tensor, n_experts: int, **options: Any) -> None:
        rank, *outer = left_start.shape
        d_out, d_in = (one * other for one, other in zip(outer, right_start.shape[1:], strict=True))
        super().__init__(d_in, d_out, n_experts, **{**options, "rank": rank})
        # block by block a row meets 2 r products of each factor: seldom less than one product with the whole ΔW
        a_row = 2 * rank * (d_in * right_start.shape[1] + outer[1] * d_out)  # r i o₂ and r i₁ o
        self.few, self.few_alone = few_for(a_row, 2 * rank, d_in, d_out)
        self.register_buffer("left_start", left_start, persistent=False)
        self.register_buffer("right_start", right_start, persistent=False)
        self.left = nn.Parameter(torch.zeros(n_experts, *left_start.shape))
        self.right = nn.Parameter(torch.zeros(n_experts, *right_start.shape))

    def reset_parameters(self) -> None:
        """Set both offsets, (E, r, o₁, i₁) and (E, r, o₂, i₂), to zero."""
        nn.init.zeros_(self.left)
        nn.init.zeros_(self.right)

    def _terms(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return [A - A⁰; A⁰] (2 r, o₁, i₁) and [B; B - B⁰] (2 r, o₂, i₂) of one expert, the scale in the first."""
        left, right = tensors["left"].to(dtype), tensors["right"].to(dtype)
        lefts = torch.cat([left, self.left_start.to(dtype)]) * self.scaling
        return lefts, torch.cat([right + self.right_start.to(dtype), right])

    def change(self, tensors: Tensors) -> Tensor:
        """Return ΔW (o, i) of one expert."""
        lefts, rights = self._terms(tensors, tensors["left"].dtype)
        return torch.einsum("jab,jcd->acbd", lefts, rights).flatten(2).flatten(0, 1)

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of x (*rows, i), block by block: no product is formed."""
        lefts, rights = self._terms(tensors, x.dtype)
        n_terms, d_left, _ = lefts.shape
        blocks = x.unflatten(-1, (lefts.shape[2], rights.shape[2]))  # (*rows, i₁, i₂)
        inner = blocks @ rights.flatten(0, 1).mT  # (*rows, i₁, 2 r · o₂)
        inner = inner.unflatten(-1, (n_terms, -1)).transpose(-3, -2).flatten(-3, -2)  # (*rows, 2 r · i₁, o₂)
        across = lefts.transpose(0, 1).reshape(d_left, -1)  # (o₁, 2 r · i₁)
        return (across @ inner).flatten(-2)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


def kronecker_terms(weight: Tensor, outer: tuple[int, int], inner: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return W (o, i) = Σ_j σ_j U_j ⊗ V_j: U (q, o₁, i₁), σ (q,) descending, V (q, o₂, i₂), each of norm 1.

    Args:
        weight: W.
        outer: (o₁, o₂), whose product is o.
        inner: (i₁, i₂), whose product is i.

    Source: Van Loan and Pitsianis 1993: the singular value decomposition of W rearranged, a row for each block.
    """
    blocks = weight.view(outer[0], outer[1], inner[0], inner[1]).transpose(1, 2)  # (o₁, i₁, o₂, i₂)
    rows = blocks.reshape(outer[0] * inner[0], outer[1] * inner[1])
    u, s, vt = singular(rows, min(rows.shape))
    return u.T.reshape(-1, outer[0], inner[0]), s, vt.reshape(-1, outer[1], inner[1])


@register_expert("soka", "Chong and Qu 2025, arXiv 2506.15251")
@dataclass(frozen=True, kw_only=True)
class SoKA(Family):
    """A sum of at most r Kronecker products, which starts at the first ones of the base's weight.

    Args:
        factor: features of the left matrices, dividing those of every layer; -1 is the divisor next to their root.
        energy: above 0, a layer has only as many products as hold this share of its weight's squared norm.
        elbow: it has only as many as come before its spectrum's bend.

    Raises:
        ConfigError: a factor of 0 or below -1, or a share outside [0, 1].

    Differs: the paper takes its first products off the base, of which a second expert would have none: here experts are
        what their products moved away from there; outputs and gradients are the same, and weight decay draws to the
        base. It says that an energy and an elbow prune the products, and not which share or which bend: here the share
        is a keyword, and the bend is the place furthest below the line between the spectrum's ends.
    """

    places = ("input",)
    uses = ("rank", "alpha", "dropout")

    factor: int = -1
    energy: float = 0.0
    elbow: bool = False

    def __post_init__(self) -> None:
        if self.factor < 1 and self.factor != -1:
            raise ConfigError(f"factor must be -1 or at least 1, got {self.factor}.")
        if not 0 <= self.energy <= 1:
            raise ConfigError(f"energy must be a share of the squared norm in [0, 1], 0 for none, got {self.energy}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with left (E, r, o₁, i₁) and right (E, r, o₂, i₂).

        Raises:
            ConfigError: no weight to start from, a factor that does not divide a side of the layer (the nearest that do
                are named), or more products than its weight has.
        """
        if self.factor > 0:
            for size in (site.d_in, site.d_out):
                divides("factor", self.factor, size, site.name)
        inner, outer = factor_pair(site.d_in, self.factor), factor_pair(site.d_out, self.factor)
        weight = weight_of(site, self.name)
        left, spectrum, right = kronecker_terms(weight, outer, inner)
        rank = options["rank"]
        if rank > len(spectrum):
            raise ConfigError(
                f"{site.name}: a weight {tuple(weight.shape)} in blocks of ({outer[1]}, {inner[1]}) is a sum of "
                f"{len(spectrum)} Kronecker products: rank={rank} is too many."
            )
        if self.energy:
            rank = min(rank, max(1, rank_for_energy(spectrum, self.energy)))
        if self.elbow:
            rank = min(rank, rank_at_elbow(spectrum))
        root = spectrum[:rank].sqrt()[:, None, None]
        return SoKABank(left[:rank] * root, right[:rank] * root, n_experts, **options)
