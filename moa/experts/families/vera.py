"""VeRA experts: two vectors around random matrices that all layers share. Kopiczko et al. 2023, arXiv 2310.11454."""

from __future__ import annotations

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
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import Frozen, generator, widest
from ..slotwise import slots


class VeRABank(ExpertBank):
    """E pairs of vectors around one random pair of matrices: E_e(x) = b_e ⊙ B (d_e ⊙ (A x)).

    | parameter | shape | start |
    |---|---|---|
    | inner (d) | (E, r) | 0.1 |
    | outer (b) | (E, o) | zero |

    A (r, i) and B (o, r) are the leading columns and rows of the matrices that all layers share.

    Args:
        site: the layer; its `shared` holds down (r, i') and up (o', r), at least as large as the layer.
        n_experts: E.
        start: what d begins with.
        options: rank and dropout as in `ExpertBank`; there is no scale.

    Source: arXiv 2310.11454, eq. 2.
    """

    equal_at_init = True
    per_expert = ("inner", "outer")

    def __init__(self, site: Site, n_experts: int, bases: nn.Module, start: float = 0.1, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.bases, self.start = bases, start
        self.inner = nn.Parameter(torch.empty(n_experts, self.rank))
        self.outer = nn.Parameter(torch.empty(n_experts, self.d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set inner (E, r) to its start and outer (E, o) to zero."""
        nn.init.constant_(self.inner, self.start)
        nn.init.zeros_(self.outer)

    @property
    def down(self) -> Tensor:
        """A (r, i)."""
        full: Tensor = self.bases.down  # type: ignore[assignment]
        return full[:, : self.d_in]

    @property
    def up(self) -> Tensor:
        """B (o, r)."""
        full: Tensor = self.bases.up  # type: ignore[assignment]
        return full[: self.d_out]

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return b_e ⊙ B (d_e ⊙ (A x)), (*rows, o), of x (*rows, i)."""
        hidden = F.linear(x, self.down.to(x.dtype)) * self.inner[expert].to(x.dtype)
        return F.linear(hidden, self.up.to(x.dtype)) * self.outer[expert].to(x.dtype)

    def delta(self, expert: int) -> Delta:
        """Return diag(b_e) B diag(d_e) A, (o, i), as factors."""
        up = self.outer[expert].detach().unsqueeze(1) * self.up  # (o, r)
        return low_rank(self.inner[expert].detach().unsqueeze(1) * self.down, up)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_k w_k E_{e_k}(x), (*rows, o), of x (*rows, i): one product down, one up for each slot."""
        hidden = F.linear(F.dropout(x, self.dropout, self.training), self.down.to(x.dtype))  # (*rows, r)
        up, dtype = self.up.to(hidden.dtype), hidden.dtype
        y = hidden.new_zeros(*hidden.shape[:-1], self.d_out)
        for weight, (inner, outer) in slots(routing, self.inner, self.outer):
            y = y + F.linear(hidden * inner.to(dtype), up) * (weight * outer).to(dtype)
        return y

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}"


def kaiming(shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Return a random matrix (p, q), uniform within ±√(6 / q), as He et al. 2015 start a layer of q inputs."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)


@register_expert("vera", "Kopiczko et al. 2023, arXiv 2310.11454")
@dataclass(frozen=True, kw_only=True)
class VeRA(Family):
    """Two vectors around a frozen random pair of matrices, one for all layers and experts, kept as its seed.

    Args:
        seed: of the random matrices, drawn on the CPU as peft draws them.
        start: what the inner vector begins with.
        save_bases: store the random matrices, for machines whose PyTorch may draw others.

    Differs: peft stores the matrices unless told otherwise.
    """

    places = ("input", "output", "block")
    uses = ("rank", "dropout")

    seed: int = 0
    start: float = 0.1
    save_bases: bool = False

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module:
        """Return down (r, i) and up (o, r) for the widest of the layers."""
        d_in, d_out = widest(sites)
        draw = generator(self.seed)
        down = kaiming((options["rank"], d_in), draw)
        return Frozen({"down": down, "up": kaiming((d_out, options["rank"]), draw)}, self.save_bases)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with inner (E, r) and outer (E, o).

        Raises:
            ConfigError: without the shared matrices.
        """
        if shared is None:
            raise ConfigError(f"{site.name}: VeRA experts need the random matrices that their layers share.")
        return VeRABank(site, n_experts, shared, self.start, **options)
