"""RandLoRA experts: a full-rank sum of random bases under trained scales. Albert et al. 2025, arXiv 2502.00987."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...kernels import Changes, change_mixture
from ...kernels.scaled_basis import scaled_basis
from ...kernels.units import routed_units
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import Frozen, generator
from ..structured import StructuredBank, Tensors


class RandLoRABank(StructuredBank):
    """E sums of scaled random bases: ΔW_e = s · Σ_j B_j diag(λ_{e,j}) A diag(γ_{e,j}), transposed where i > o.

    | parameter | shape | start |
    |---|---|---|
    | inner (λ) | (E, r, N), N = ⌈min(o, i) / r⌉ bases | zero |
    | outer (γ) | (E, N, min(o, i)) | 1 / max(N, min(o, i)) |

    A (r, 1, min) and the B_j (max, N, r) are the leading parts of what all layers share.

    Args:
        site: the layer.
        n_experts: E.
        bases: holds down (r, 1, d) and up (D, n, r), at least as large as the layer.
        options: rank, scaling, dropout as in `ExpertBank`.

    Source: arXiv 2502.00987, eq. 4.
    Differs: the authors' code and peft pair the bases' columns in another order than the equation, N bases within each
        of r places on one side and r places within each of N bases on the other; the columns are random, and so it is
        here, for their files' sake.
    """

    equal_at_init = True
    per_expert: ClassVar[tuple[str, ...]] = ("inner", "outer")

    def __init__(self, site: Site, n_experts: int, bases: nn.Module, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.bases = bases
        self.short, self.long = sorted((self.d_in, self.d_out))
        self.n_bases = math.ceil(self.short / self.rank)
        self.inner = nn.Parameter(torch.empty(n_experts, self.rank, self.n_bases))
        self.outer = nn.Parameter(torch.empty(n_experts, self.n_bases, self.short))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set inner (E, r, N) to zero and outer (E, N, d) to its start."""
        nn.init.zeros_(self.inner)
        nn.init.constant_(self.outer, 1 / max(self.n_bases, self.short))

    def long_basis(self, dtype: torch.dtype) -> Tensor:
        """Return the bases B_j side by side, (max(o, i), r N), which all experts share."""
        up: Tensor = self.bases.up  # type: ignore[assignment]
        return up[: self.long, : self.n_bases].to(dtype).flatten(1)

    def _short_basis(self, dtype: torch.dtype) -> Tensor:
        down: Tensor = self.bases.down  # type: ignore[assignment]
        return down[..., : self.short].to(dtype)  # (r, 1, min)

    def change(self, tensors: Tensors) -> Tensor:
        """Return ΔW (o, i) of one expert."""
        short = self._own_factor(tensors)
        change = self.long_basis(short.dtype) @ short  # (max, min)
        return change if self.d_in <= self.d_out else change.T

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of x (*rows, i), factor by factor."""
        short, long = self._own_factor(tensors).to(x.dtype), self.long_basis(x.dtype)
        down, up = (short, long) if self.d_in <= self.d_out else (long.T, short.T)
        return F.linear(F.linear(x, down), up)

    def _own_factor(self, tensors: Tensors) -> Tensor:
        inner, outer = tensors["inner"], tensors["outer"]
        return scaled_basis(inner, self._short_basis(inner.dtype), outer, self.scaling)  # (r N, min)

    def changes(self, x: Tensor | None = None) -> Changes:
        """Return what the kernel needs to form ΔW (o, i) of each expert."""
        return replace(super().changes(x), apply=None)

    def own_factors(self) -> Changes:
        """Return what the kernel needs for the experts' own factors, (r N, i) before the bases or (o, r N) behind."""
        known = self.changes()
        if self.d_in <= self.d_out:
            return replace(known, form=self._own_factor, d_out=self.rank * self.n_bases)
        return replace(known, form=lambda tensors: self._own_factor(tensors).T)

    def is_one_weight(self, x: Tensor, routing: Routing) -> bool:
        """Return whether all rows of x (*rows, i) share a routing, and are so many that forming ΔW (o, i) costs less.

        The bases' product takes n R (i + o) for n rows, forming R i o for each expert, where the base has a product
        anyway; in training, both again for the gradients, with n R or n (o i) / min(o, i) for each of the short side.
        """
        if routed_units(x, routing.weights):
            return False
        inner, n_rows = self.rank * self.n_bases, x.shape[:-1].numel()
        n_active = self.n_experts if routing.indices is None else routing.indices.shape[-1]
        by_rows, forming = inner * (self.d_in + self.d_out), n_active * inner * self.d_in * self.d_out
        if torch.is_grad_enabled():
            by_rows, forming = 2 * by_rows + inner * self.short - self.d_in * self.d_out, 3 * forming
        return n_rows * by_rows > forming

    def mix_changes(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e ΔW_e x, (*rows, o) of x (*rows, i): the bases that all experts share multiply once."""
        if self.is_one_weight(x, routing):
            return super().mix_changes(x, routing)
        bases = self.long_basis(x.dtype)  # (max(o, i), r N)
        if self.d_in <= self.d_out:
            hidden = change_mixture(x, routing.weights, routing.indices, self.own_factors())  # (*rows, r N)
            return F.linear(hidden, bases.to(hidden.dtype))
        return change_mixture(F.linear(x, bases.T), routing.weights, routing.indices, self.own_factors())

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, n_bases={self.n_bases}, scaling={self.scaling:g}"


def dense_basis(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    """Return a basis (p, q, d) drawn as peft draws it: He-uniform of gain 1/√3, in bfloat16."""
    return nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=draw)


def ternary_basis(shape: tuple[int, ...], sparsity: float, draw: torch.Generator) -> Tensor:
    """Return a basis (p, q, d) of -1, 0 and 1, of which one in `sparsity` is not 0."""
    drawn = torch.rand(shape, generator=draw)
    edge = 1 / (2 * sparsity)
    return (drawn > 1 - edge).float() - (drawn < edge).float()


def unit_spread(basis: Tensor) -> Tensor:
    """Return a basis (p, q, d) over its standard deviation, in float32; one that has none as it is."""
    spread = basis.std() if basis.numel() > 1 else basis.new_ones(())
    return (basis / spread if spread > 0 else basis).float()


@register_expert("randlora", "Albert et al. 2025, arXiv 2502.00987")
@dataclass(frozen=True, kw_only=True)
class RandLoRA(Family):
    """A full-rank sum of random bases that all layers and experts share, kept as their seed.

    Args:
        seed: of the random bases, drawn on the CPU as peft draws them.
        sparse: bases of -1, 0, 1: one entry in 3 is not 0.
        very_sparse: one in √d is not 0.
        save_bases: store the bases, for machines whose PyTorch may draw others.

    Differs: peft stores the bases unless told otherwise, and its usual alpha is 20 · rank, as here.
    """

    uses = ("rank", "alpha", "dropout")
    usual_scale = 20.0

    seed: int = 0
    sparse: bool = False
    very_sparse: bool = False
    save_bases: bool = False

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module:
        """Return down (r, 1, d) and up (D, N, r) for the largest of the layers."""
        rank, draw = options["rank"], generator(self.seed)
        short, long = sorted((max(s.d_out for s in sites), max(s.d_in for s in sites)))
        n_bases = math.ceil(short / rank)
        if self.sparse or self.very_sparse:
            sparsity = math.sqrt(short) if self.very_sparse else 3.0
            down = ternary_basis((rank, 1, short), sparsity, draw)
            up = ternary_basis((long, n_bases, rank), sparsity, draw)
        else:
            down = dense_basis((rank, 1, short), draw)
            up = torch.cat([dense_basis((long, 1, rank), draw) for _ in range(n_bases)], 1)
        return Frozen({"down": unit_spread(down), "up": unit_spread(up)}, self.save_bases)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with inner (E, r, N) and outer (E, N, d).

        Raises:
            ConfigError: without the shared bases.
        """
        if shared is None:
            raise ConfigError(f"{site.name}: RandLoRA experts need the random bases that their layers share.")
        return RandLoRABank(site, n_experts, shared, **options)
