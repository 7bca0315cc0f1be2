"""Butterfly orthogonal experts: a product of block rotations of permuted inputs. BOFT, arXiv 2311.06243."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import Site
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import divides, weight_of
from ..structured import StructuredBank, Tensors
from .oft import cayley


class BOFTBank(StructuredBank):
    """E rotations of a weight's inputs, and a scale of its outputs: W_e = diag(s_e) W0 M_e^T.

    M_e = Π_j P_j blockdiag(R_{e,j}) P_j^T, R orthogonal blocks, P_j the butterfly's permutations

    | parameter | shape | start |
    |---|---|---|
    | rotation | (E, m, i / b, b, b), of which the skew-symmetric part counts | zero |
    | scale (s) | (E, o) | one |

    Args:
        site: the layer, whose weight W0 (o, i) is read where it is used and never stored.
        n_experts: E.
        block_size: b, dividing i.
        n_factors: m, of the butterfly.
        options: dropout as in `ExpertBank`.

    Source: arXiv 2311.06243, eq. 3 to 5.
    """

    whole = True
    equal_at_init = True
    per_expert: ClassVar[tuple[str, ...]] = ("rotation", "scale")

    orders: Tensor

    def __init__(self, site: Site, n_experts: int, block_size: int, n_factors: int = 1, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.site, self.block_size = site, block_size
        n_blocks = self.d_in // block_size
        self.rotation = nn.Parameter(torch.zeros(n_experts, n_factors, n_blocks, block_size, block_size))
        self.scale = nn.Parameter(torch.ones(n_experts, self.d_out))
        orders = [
            butterfly(self.d_in, block_size, j) if n_factors > 1 else torch.arange(self.d_in) for j in range(n_factors)
        ]
        self.register_buffer("orders", torch.stack(orders), persistent=False)

    def reset_parameters(self) -> None:
        """Set the rotations (E, m, i / b, b, b) to zero and the scales (E, o) to one."""
        nn.init.zeros_(self.rotation)
        nn.init.ones_(self.scale)

    def change(self, tensors: Tensors) -> Tensor:
        """Return diag(s) W0 M^T - W0, (o, i), of one expert."""
        rotation: Tensor = tensors["rotation"]  # (m, i / b, b, b)
        weight = self.site.weight().detach().to(rotation.dtype)
        turned = weight
        blocks = cayley((rotation - rotation.mT).flatten(0, 1) / 2).view_as(rotation)
        for order, block in zip(self.orders, blocks, strict=True):
            inside = turned[:, order].unflatten(1, (-1, self.block_size))  # (o, i / b, b)
            moved = torch.einsum("onc,nkc->onk", inside, block).flatten(1)
            turned = moved[:, order.argsort()]
        return tensors["scale"].unsqueeze(1) * turned - weight

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, block_size={self.block_size}, n_factors={len(self.orders)}"


def butterfly(size: int, block_size: int, level: int) -> Tensor:
    """Return the order (i,) in which factor `level` of a butterfly sees its inputs.

    In stretches of b · 2^level places, the half blocks with an even number come first, then the odd ones.
    """
    half = block_size // 2
    stretches = torch.arange(size).view(-1, 2**level, 2, half)
    return stretches.transpose(1, 2).reshape(size)


@register_expert("boft", "Liu et al. 2023, arXiv 2311.06243")
@dataclass(frozen=True, kw_only=True)
class BOFT(Family):
    """A butterfly of rotations of the layer's input, for a routing that is constant, by task or by example.

    Args:
        block_size: b, dividing the input features of every layer.
        n_factors: m, of the butterfly: b · 2^(m - 1) divides the input features, and b is even where m > 1.

    Raises:
        ConfigError: a block of less than 2 features, no factor, or more than one with an odd block.
    """

    places = ("input",)
    uses = ("dropout",)

    block_size: int = 4
    n_factors: int = 1

    def __post_init__(self) -> None:
        if self.block_size < 2 or self.n_factors < 1:
            raise ConfigError(
                f"a butterfly needs block_size ≥ 2 and n_factors ≥ 1, got {self.block_size} and {self.n_factors}."
            )
        if self.n_factors > 64:  # each doubles the entries that a block's outputs come from
            raise ConfigError(f"n_factors must be at most 64, got {self.n_factors}: no layer is so wide.")
        if self.n_factors > 1 and self.block_size % 2:
            raise ConfigError(f"a butterfly of several factors halves its blocks: block_size={self.block_size} is odd.")

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with rotation (E, m, i / b, b, b) and scale (E, o).

        Raises:
            ConfigError: b, or b · 2^(m - 1), does not divide i (the nearest that do are named); no weight to rotate.
        """
        divides("block_size", self.block_size, site.d_in, site.name)
        divides("block_size · 2^(n_factors - 1)", self.block_size * 2 ** (self.n_factors - 1), site.d_in, site.name)
        weight_of(site, self.name)
        return BOFTBank(site, n_experts, self.block_size, self.n_factors, **options)
