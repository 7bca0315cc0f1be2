"""Experts that are matrix product states: low-rank factors that are tensor trains themselves. arXiv 2601.06788."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import Site
from ..bank import ExpertBank
from ..factored import FactoredBank
from ..family import Family, register_expert
from ..modes import checked_modes, mode_sizes


class MPSBank(FactoredBank):
    """E matrix product states over the modes o₁ … o_N | i₁ … i_M, cut once between what a layer writes and reads.

    ΔW_e[(p₁ … p_N), (q₁ … q_M)] = s · G₁[p₁] ⋯ G_N[p_N] H₁[q₁] ⋯ H_M[q_M], matrices (χ, χ'), the outer ones vectors.
    The bond at the cut is r, so that the Gs make up (r, o) and the Hs make down (r, i).

    | parameter | shape | start |
    |---|---|---|
    | up_0 (G₁) … up_{N-1} | (E, χ, o_n, χ') | zero, and N(0, 1/χ) |
    | down_0 (H₁) … down_{M-1} | (E, χ, i_m, χ') | N(0, 1/χ'), the last N(0, 1/(3 i)) |

    Args:
        outer: (o₁, …, o_N), whose product is o.
        inner: (i₁, …, i_M), whose product is i.
        n_experts: E.
        options: rank (the largest bond), scaling, dropout and engine as in `ExpertBank`.

    Source: arXiv 2601.06788, the matrix-product-state adaptation; Oseledets 2011, eq. 1.1, for tensor trains.
    """

    def __init__(self, outer: Sequence[int], inner: Sequence[int], n_experts: int, **options: Any) -> None:
        super().__init__(math.prod(inner), math.prod(outer), n_experts, **options)
        self.outer, self.inner = tuple(outer), tuple(inner)
        up = [1, *(min(self.rank, math.prod(outer[:n])) for n in range(1, len(outer))), self.rank]
        down = [self.rank, *(min(self.rank, math.prod(inner[n:])) for n in range(1, len(inner))), 1]
        for kind, sizes, bonds in (("up", outer, up), ("down", inner, down)):
            for n, size in enumerate(sizes):
                core = nn.Parameter(torch.empty(n_experts, bonds[n], size, bonds[n + 1]))
                self.register_parameter(f"{kind}_{n}", core)
        self.reset_parameters()

    @property
    def per_expert(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the cores (E, χ, d, χ')."""
        return tuple(f"up_{n}" for n in range(len(self.outer))) + tuple(f"down_{n}" for n in range(len(self.inner)))

    def _cores(self, kind: str) -> list[Tensor]:
        return [getattr(self, name) for name in self.per_expert if name.startswith(kind)]

    def reset_parameters(self) -> None:
        """Draw the cores (E, χ, d, χ') anew, the first of them zero: entries of down are as large as in a LoRA."""
        first, *ups = self._cores("up")
        *downs, last = self._cores("down")
        nn.init.zeros_(first)
        for core in ups:
            nn.init.normal_(core, std=core.shape[1] ** -0.5)
        for core in downs:
            nn.init.normal_(core, std=core.shape[3] ** -0.5)
        nn.init.normal_(last, std=(3 * self.d_in) ** -0.5)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o), made of the cores at each call."""
        up, down = contracted(self._cores("up")), contracted(self._cores("down"))
        return down.squeeze(-1), up.squeeze(1).mT  # (E, r, i), and (E, o, r) turned

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, inner={self.inner}, outer={self.outer}"


def contracted(cores: Sequence[Tensor]) -> Tensor:
    """Return the train (E, χ, d₁ ⋯ d_N, χ') of cores (E, χ, d_n, χ'), joined from left to right."""
    train, *others = cores
    for core in others:
        joined = train.flatten(1, 2) @ core.flatten(2)  # (E, χ · d, d' · χ')
        train = joined.view(len(core), train.shape[1], -1, core.shape[3])
    return train


@register_expert("mps", "Chen et al. 2026, arXiv 2601.06788")
@dataclass(frozen=True, kw_only=True)
class MPS(Family):
    """A matrix product state of bond r over a layer's features cut into modes: a LoRA whose factors are trains.

    Args:
        modes: into how many a side of the layer is cut, as equal as can be (1 is a LoRA), or the sizes of all modes but
            the last, of both sides.

    Raises:
        ConfigError: fewer than one mode.

    Differs: the paper says that a fine-tuned change has the form of a matrix product state, a LoRA being the one with a
        single small bond at the cut, and not how its modes are cut nor where training starts: here all bonds are r, or
        as large as can be of use, and the first core starts at zero.
    """

    modes: int | tuple[int, ...] = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", checked_modes(self.modes))

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with cores (E, χ, d, χ').

        Raises:
            ConfigError: a size that does not divide what is left of a side; the nearest that do are named.
        """
        outer, inner = (mode_sizes(size, self.modes, site.name) for size in (site.d_out, site.d_in))
        return MPSBank(outer, inner, n_experts, **options)
