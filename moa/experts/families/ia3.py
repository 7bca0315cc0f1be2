"""(IA)³ experts: one vector that scales a layer's output or its input. Liu et al. 2022, arXiv 2205.05638."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, Dense, Sparse
from ...errors import ConfigError
from ...layers import Site, is_convolution
from ...types import Routing
from ..bank import Axes, ExpertBank
from ..family import Family, register_expert
from ..fused import Fused
from ..slotwise import mixed_rows


class OutputScaleBank(ExpertBank):
    """E vectors on a layer's output y0: E_e(y0) = v_e ⊙ y0.

    | parameter | shape | start |
    |---|---|---|
    | scale (v = l - 1) | (E, o) | zero |

    Args:
        d_in: o, as it sits on the output.
        d_out: o.
        n_experts: E.
        options: dropout as in `ExpertBank`.

    Source: arXiv 2205.05638, §3.3: l ⊙ y0 with l = 1 + v.
    Differs: v = l - 1 is stored, so that a mixture of experts is y0 + Σ_e w_e v_e ⊙ y0, whatever the weights sum to.
    """

    equal_at_init = True
    per_expert: ClassVar[tuple[str, ...]] = ("scale",)
    axes: ClassVar[Axes] = {"scale": "out"}
    averages: ClassVar[bool] = True

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.scale = nn.Parameter(torch.zeros(n_experts, d_in))

    def reset_parameters(self) -> None:
        """Set scale (E, d) to zero."""
        nn.init.zeros_(self.scale)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return v_e ⊙ y0, (*rows, o), of y0 (*rows, o)."""
        return x * self.scale[expert].to(x.dtype)

    def delta(self, expert: int) -> Delta:
        """Return diag(v_e), (o, o), as its diagonal."""
        places = torch.arange(self.d_out, device=self.scale.device) * (self.d_out + 1)
        return Sparse(places, self.scale[expert].detach(), torch.Size((self.d_out, self.d_out)))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return (Σ_e w_e v_e) ⊙ y0, (*rows, o), of y0 (*rows, o)."""
        x = F.dropout(x, self.dropout, self.training)
        return x * mixed_rows(routing, self.scale).to(x.dtype)


class InputScaleBank(OutputScaleBank):
    """E vectors on a layer's input: E_e(x) = W0 (v_e ⊙ x).

    | parameter | shape | start |
    |---|---|---|
    | scale (v = l - 1) | (E, i) | zero |

    Args:
        site: the layer, whose weight W0 (o, i) is read where it is used and never stored.
        n_experts: E.
        options: dropout as in `ExpertBank`.

    Source: arXiv 2205.05638, §3.3, between the two products of a feed-forward block.
    """

    axes = ExpertBank.axes  # an expert reads the whole weight

    def __init__(self, site: Site, n_experts: int, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.site = site

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return W0 (v_e ⊙ x), (*rows, o), of x (*rows, i)."""
        return F.linear(super().expert_forward(x, expert), self.site.weight().detach().to(x.dtype))

    def delta(self, expert: int) -> Delta:
        """Return W0 diag(v_e), (o, i)."""
        return Dense(self.site.weight().detach().to(self.scale.dtype) * self.scale[expert].detach())

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return W0 ((Σ_e w_e v_e) ⊙ x), (*rows, o), of x (*rows, i)."""
        return F.linear(super().forward(x, routing), self.site.weight().detach().to(x.dtype))

    @property
    def fused(self) -> FusedScale:
        """Base and experts as one product, on rows (*rows, i)."""
        return FusedScale(self)


class FusedScale(Fused):
    """W0 (x + m ⊙ x) + b on rows (*rows, i): the experts cost no product of their own."""

    __slots__ = ()

    bank: InputScaleBank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return W0 (x + Σ_e w_e v_e ⊙ x) + b, (*rows, o)."""
        bank = self.bank
        dropped = F.dropout(x, bank.dropout, bank.training)
        scaled = torch.addcmul(x, dropped, mixed_rows(routing, bank.scale).to(x.dtype))
        return F.linear(scaled, weight, bias)


@register_expert("ia3", "Liu et al. 2022, arXiv 2205.05638")
@dataclass(frozen=True, kw_only=True)
class IA3(Family):
    """A vector that scales what a layer puts out, or takes in.

    Args:
        feedforward: name endings of the layers whose input is scaled, as the paper does between the two products of a
            feed-forward block; of the others it is the place that `place` names.

    Raises:
        ConfigError: an input of a convolution, whose channels lie in several places of a row.
    """

    places = ("output", "input", "block")
    uses = ("dropout",)

    feedforward: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.feedforward, str | list):
            names = [self.feedforward] if isinstance(self.feedforward, str) else self.feedforward
            object.__setattr__(self, "feedforward", tuple(names))

    def place_of(self, name: str, place: str) -> str:
        """Return "input" for a feed-forward layer (i -> o), else the place as given."""
        found = any(name == ending or name.endswith(f".{ending}") for ending in self.feedforward)
        return "input" if found and place == "output" else place

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with scale (E, i) or (E, o).

        Raises:
            ConfigError: an input of a convolution, or of a layer whose weight cannot be read.
        """
        if site.place != "input":
            return OutputScaleBank(site.d_in, site.d_out, n_experts, **options)
        if is_convolution(site.module):
            raise ConfigError(
                f"{site.name} is a convolution, whose input channels lie in several places of a row: (IA)³ scales its "
                "output; leave it out of feedforward, or choose place='output'."
            )
        site.weight()  # named now, if it cannot be read, and not in the middle of a forward
        return InputScaleBank(site, n_experts, **options)
