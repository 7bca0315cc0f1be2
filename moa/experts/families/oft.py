"""Orthogonal experts: the weight's inputs rotated block by block. OFT, arXiv 2306.07280; BOFT, arXiv 2311.06243."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, Dense
from ...errors import ConfigError
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import divides, weight_of
from ..fused import Fused
from ..slotwise import slots


def cayley(skew: Tensor, terms: int = 0) -> Tensor:
    """Return (I - Q)(I + Q)⁻¹ of skew-symmetric blocks Q (n, b, b), orthogonal; with terms, its Neumann series.

    Args:
        skew: Q.
        terms: of I + 2 Q + 2 Q² + … + Q^(terms - 1) in place of the inverse of I - Q; 0 is exact.

    Differs: the series is that of (I + Q)(I - Q)⁻¹, the inverse rotation, as in peft and the authors' second version.
    """
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if not terms:
        return torch.linalg.solve(eye + skew, eye - skew, left=False)
    out, power = eye.expand_as(skew), skew
    for number in range(1, terms):
        last = number == terms - 1 and number > 1
        out = out + (power if last else 2 * power)
        power = power @ skew
    return out


class OFTBank(ExpertBank):
    """E rotations of a weight's inputs: W_e = W0 blockdiag(R_e)^T, R_e orthogonal blocks (i / b, b, b).

    | parameter | shape | start |
    |---|---|---|
    | rotation (Q above its diagonal) | (E, i / b, b (b - 1) / 2) | zero |

    Args:
        site: the layer, whose weight W0 (o, i) is read where it is used and never stored.
        n_experts: E.
        block_size: b, dividing i.
        terms: of the Neumann series; 0 is the exact Cayley transform.
        share: one rotation for all blocks.
        options: dropout as in `ExpertBank`.

    Source: arXiv 2306.07280, eq. 4 and §3.3.
    Differs: as peft, which rotates inputs where the paper rotates a layer's neurons, and sums the series of 2506.19847.
    """

    whole = True
    equal_at_init = True
    per_expert: ClassVar[tuple[str, ...]] = ("rotation",)

    def __init__(
        self, site: Site, n_experts: int, block_size: int, terms: int = 5, share: bool = False, **options: Any
    ) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.site, self.block_size, self.terms = site, block_size, terms
        n_blocks = 1 if share else self.d_in // block_size
        self.rotation = nn.Parameter(torch.zeros(n_experts, n_blocks, block_size * (block_size - 1) // 2))

    def reset_parameters(self) -> None:
        """Set the rotations (E, i / b, b (b - 1) / 2) to zero: no rotation."""
        nn.init.zeros_(self.rotation)

    def turns(self) -> Tensor:
        """Return R_e - I of each expert's blocks, (E, i / b, b, b), or (E, 1, b, b) where all blocks share one."""
        above = self.rotation  # (E, n, b (b - 1) / 2)
        b = self.block_size
        rows, columns = torch.triu_indices(b, b, 1, device=above.device)
        places = (rows * b + columns).expand(*above.shape[:-1], -1)
        upper = above.new_zeros(*above.shape[:-1], b * b).scatter(-1, places, above).unflatten(-1, (b, b))
        return cayley(upper - upper.mT, self.terms) - torch.eye(b, dtype=above.dtype, device=above.device)

    def turned(self, x: Tensor, turn: Tensor) -> Tensor:
        """Return what blocks (*rows, n, b, b) add to the rows that they rotate, (*rows, i) of x (*rows, i)."""
        blocks = x.unflatten(-1, (-1, self.block_size))  # (*rows, i / b, b)
        turn = turn.expand(*turn.shape[:-3], blocks.shape[-2], -1, -1).to(x.dtype)
        return torch.einsum("...nk,...nkc->...nc", blocks, turn).flatten(-2)

    def mixed(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e (x R_e - x), (*rows, i) of x (*rows, i): the rotations are mixed, once for each routing."""
        x, mixed = F.dropout(x, self.dropout, self.training), self.rotation.new_zeros(())
        for weight, (turn,) in slots(routing, self.turns()):
            mixed = mixed + weight[..., None, None].to(turn.dtype) * turn  # (*rows of the routing, n, b, b)
        return self.turned(x, mixed)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return W0 (x R_e - x), (*rows, o), of x (*rows, i)."""
        return F.linear(self.turned(x, self.turns()[expert]), self.site.weight().detach().to(x.dtype))

    def delta(self, expert: int) -> Delta:
        """Return W0 (blockdiag(R_e)^T - I), (o, i)."""
        turn = self.turns()[expert].detach()
        return Dense(self.turned(self.site.weight().detach().to(turn.dtype), turn.mT))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return W0 Σ_e w_e (x R_e - x), (*rows, o), of x (*rows, i)."""
        return F.linear(self.mixed(x, routing), self.site.weight().detach().to(x.dtype))

    @property
    def fused(self) -> FusedRotation:
        """The base's product with the rows that are rotated, (*rows, i): the experts have none of their own."""
        return FusedRotation(self)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, block_size={self.block_size}"


class FusedRotation(Fused):
    """W0 (x + Σ_e w_e (x R_e - x)) + b on rows (*rows, i)."""

    __slots__ = ()

    bank: OFTBank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return base and mixture together, (*rows, o), as one product."""
        return F.linear(x + self.bank.mixed(x, routing), weight, bias)


@register_expert("oft", "Qiu et al. 2023, arXiv 2306.07280")
@dataclass(frozen=True, kw_only=True)
class OFT(Family):
    """A rotation of the layer's input, block by block, for a routing that is constant, by task or by example.

    Args:
        block_size: b, dividing the input features of every layer.
        terms: of the Neumann series of the rotation, as in peft; 0 is the exact one.
        share: one rotation for all blocks of a layer.

    Raises:
        ConfigError: a block of less than 2 features, or less than 0 terms.
    """

    places = ("input",)
    uses = ("dropout",)

    block_size: int = 32
    terms: int = 5
    share: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.terms < 0:
            raise ConfigError(f"a rotation needs block_size ≥ 2 and terms ≥ 0, got {self.block_size} and {self.terms}.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with rotation (E, i / b, b (b - 1) / 2).

        Raises:
            ConfigError: b does not divide i (the nearest that do are named), or no weight to rotate.
        """
        divides("block_size", self.block_size, site.d_in, site.name)
        weight_of(site, self.name)
        return OFTBank(site, n_experts, self.block_size, self.terms, self.share, **options)
