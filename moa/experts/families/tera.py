"""Experts that are vectors in a random tensor network: a high rank for few numbers. TeRA, Gu et al. 2025."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, low_rank
from ...errors import ConfigError
from ...layers import Site
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import Frozen, generator
from ..modes import checked_modes, mode_sizes
from ..structured import StructuredBank, Tensors, few_for

LARGEST = 2**24  # numbers of a core tensor


class TeRABank(StructuredBank):
    """E scalings of one random tensor: ΔW_e = s · diag(b_e) B A diag(a_e), b_e = ⊗_n b_{e,n} and a_e = ⊗_m a_{e,m}.

    With the modes (p₁ … p_N, q₁ … q_M) of (o, i), that is
    ΔW_e[p, q] = s/√i · Σ_{jk} G[j, k] Π_n b_{e,n}[p_n] U_n[p_n, j_n] Π_m a_{e,m}[q_m] V_m[q_m, k_m].

    | tensor | shape | start |
    |---|---|---|
    | out_0 (b₁) … | (E, o_n) | zero, the others 1 |
    | in_0 (a₁) … | (E, i_m) | 1 |
    | up (B = ⊗_n U_n) | (o, r^N), frozen, one for all layers of a size | N(0, 1/r) each |
    | down (A = G (⊗_m V_m)^T / √i) | (r^N, i), frozen, one for all layers of a size | N(0, 1), N(0, 1/r) each |

    Its rank is up to r^N whatever is trained, E (Σ_n o_n + Σ_m i_m) numbers.

    Args:
        outer: (o₁, …, o_N), whose product is o.
        inner: (i₁, …, i_M), whose product is i.
        n_experts: E.
        bases: holds the buffers down_i and up_o, i and o being the features.
        options: rank, scaling and dropout as in `ExpertBank`.

    Source: arXiv 2509.03234, its abstract: a Tucker-like network of frozen random factors, which layers share, and
        trained vectors as diagonal factors.
    """

    equal_at_init = True

    def __init__(
        self, outer: Sequence[int], inner: Sequence[int], n_experts: int, bases: nn.Module, **options: Any
    ) -> None:
        super().__init__(math.prod(inner), math.prod(outer), n_experts, **options)
        components = self.rank ** len(outer)
        self.few, self.few_alone = few_for(components * (self.d_in + self.d_out), components, self.d_in, self.d_out)
        self.bases, self.outer, self.inner = bases, tuple(outer), tuple(inner)
        for kind, sizes in (("out", outer), ("in", inner)):
            for n, size in enumerate(sizes):
                self.register_parameter(f"{kind}_{n}", nn.Parameter(torch.empty(n_experts, size)))
        self.reset_parameters()

    @property
    def per_expert(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the vectors (E, d)."""
        return tuple(f"out_{n}" for n in range(len(self.outer))) + tuple(f"in_{n}" for n in range(len(self.inner)))

    def reset_parameters(self) -> None:
        """Set the first vectors out_0 (E, o₁) to zero and the others (E, d) to 1."""
        for name in self.per_expert:
            nn.init.constant_(getattr(self, name), 0.0 if name == "out_0" else 1.0)

    def _scaled(self, tensors: Tensors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return one expert's A diag(a), (r^N, i), and s diag(b) B, (o, r^N)."""
        b, a = (
            functools.reduce(torch.kron, [tensors[n] for n in self.per_expert if n.startswith(kind)])
            for kind in ("out", "in")
        )
        down: Tensor = getattr(self.bases, f"down_{self.d_in}")
        up: Tensor = getattr(self.bases, f"up_{self.d_out}")
        return down.to(dtype) * a.to(dtype), up.to(dtype) * (b * self.scaling).to(dtype).unsqueeze(1)

    def change(self, tensors: Tensors) -> Tensor:
        """Return ΔW (o, i) of one expert."""
        down, up = self._scaled(tensors, tensors["out_0"].dtype)
        return up @ down

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of x (*rows, i), factor by factor."""
        down, up = self._scaled(tensors, x.dtype)
        return F.linear(F.linear(x, down), up)

    def delta(self, expert: int) -> Delta:
        """Return ΔW_e (o, i) as factors of rank r^N."""
        tensors = {name: t.detach() for name, t in self.tensors(expert).items()}
        return low_rank(*self._scaled(tensors, tensors["out_0"].dtype))

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, inner={self.inner}, outer={self.outer}"


@register_expert("tera", "Gu et al. 2025, arXiv 2509.03234")
@dataclass(frozen=True, kw_only=True)
class TeRA(Family):
    """Vectors, one for each mode of a layer's features, in a random tensor network that layers share, kept as its seed.

    Args:
        modes: into how many a side of the layer is cut, as equal as can be, or the sizes of all modes but the last, of
            both sides; the core has r numbers along each, so that experts have the rank r^modes.
        seed: of the random factors, drawn on the CPU.
        save_bases: store them, for machines whose PyTorch may draw others.

    Raises:
        ConfigError: fewer than one mode.

    Differs: neither the paper's text nor its code could be seen here beyond the abstract. Which mode the vectors scale,
        how large the random factors are and what is zero at first are this package's: the vectors are as long as the
        features' modes, the first one is zero, and the random tensor's entries are as large as a LoRA's down.
    """

    uses = ("rank", "alpha", "dropout")

    modes: int | tuple[int, ...] = 2
    seed: int = 0
    save_bases: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", checked_modes(self.modes))

    def _cut(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the modes of what a layer writes (o) and reads (i)."""
        return mode_sizes(site.d_out, self.modes, site.name), mode_sizes(site.d_in, self.modes, site.name)

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module:
        """Return up_o (o, r^N) and down_i (r^N, i) for every size among the layers.

        Raises:
            ConfigError: a size that does not divide a side of a layer, or a core of more than 2^24 numbers.
        """
        rank, cuts = options["rank"], [self._cut(site) for site in sites]
        n_modes = len(cuts[0][0])
        if rank ** (2 * n_modes) > LARGEST:
            fits = math.floor(LARGEST ** (1 / (2 * n_modes)) + 1e-9)
            raise ConfigError(
                f"a core of {2 * n_modes} modes of rank {rank} has {rank ** (2 * n_modes)} numbers, more than 2^24: "
                f"at most rank={fits} fits, or cut the layers into fewer modes."
            )
        outer, inner = ([max(sizes) for sizes in zip(*side, strict=True)] for side in zip(*cuts, strict=True))
        draw = generator(self.seed)
        core = torch.randn(rank**n_modes, rank**n_modes, generator=draw)
        ups, downs = ([torch.randn(d, rank, generator=draw) / math.sqrt(rank) for d in side] for side in (outer, inner))
        tensors = {}
        for out_sizes, in_sizes in cuts:
            tensors[f"up_{math.prod(out_sizes)}"] = _product(ups, out_sizes)
            i = math.prod(in_sizes)
            tensors[f"down_{i}"] = core @ _product(downs, in_sizes).T / math.sqrt(i)
        return Frozen(tensors, self.save_bases)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with a vector (E, d) for each mode.

        Raises:
            ConfigError: a size that does not divide a side of the layer, the nearest that do are named; or without the
                shared factors.
        """
        if shared is None:
            raise ConfigError(f"{site.name}: TeRA experts need the random factors that their layers share.")
        return TeRABank(*self._cut(site), n_experts, shared, **options)


def _product(factors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return ⊗_n U_n (d, r^N) of the leading d_n rows of each factor (d'_n, r)."""
    return functools.reduce(
        torch.kron, [factor[:size].contiguous() for factor, size in zip(factors, sizes, strict=True)]
    )
