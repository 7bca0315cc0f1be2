"""Sparse high-rank experts: a few chosen entries of the weight. Bhardwaj et al. 2024, arXiv 2406.13175."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...delta import Delta, Sparse
from ...errors import ConfigError
from ...kernels import Changes
from ...layers import Site
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import generator, weight_of
from ..sparse import EntriesBank, check_density, n_entries, random_places
from ..structured import Tensors

MASKS = ("random", "magnitude", "structured", "given")
Mask = Literal["random", "magnitude", "structured", "given"]


class ShiRABank(EntriesBank):
    """E experts that each change n entries of the weight: ΔW_e = scatter(places_e, values_e).

    Source: arXiv 2406.13175, §3.
    """

    def change(self, tensors: Tensors) -> Tensor:
        """Return ΔW (o, i) with one expert's values at its places."""
        return self.matrix(tensors)

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of x (*rows, i)."""
        return self.times(x, tensors)

    def changes(self, x: Tensor | None = None) -> Changes:
        """Return what the kernel needs on x (*rows, i): sums over the entries (E, n) where they cost less."""
        return self.by_entries(super().changes(x), x)

    def delta(self, expert: int) -> Delta:
        """Return ΔW_e (o, i) as its places and values: written into a weight, it is taken back bit for bit."""
        return Sparse(self.places[expert], self.values[expert].detach(), torch.Size((self.d_out, self.d_in)))


def structured_places(d_out: int, d_in: int, count: int, draw: torch.Generator) -> Tensor:
    """Return `count` places (n,) of a weight (o, i): its diagonal, then whole rows and columns in random order."""
    grid = torch.arange(d_out * d_in).view(d_out, d_in)
    lines = [grid.diagonal()]
    for number in torch.randperm(d_out + d_in, generator=draw).tolist():
        if sum(map(len, lines)) >= count + (len(lines) - 1) ** 2 + min(d_out, d_in):  # crossings are counted twice
            break
        lines.append(grid[number] if number < d_out else grid[:, number - d_out])
    flat = torch.cat(lines)
    values, order = flat.sort(stable=True)
    first = torch.ones_like(values, dtype=torch.bool)
    first[1:] = values[1:] != values[:-1]
    return flat[order[first].sort().values][:count]


def largest_places(size: Tensor, n_experts: int, count: int) -> Tensor:
    """Return the places (E, n) of the largest entries of a tensor (o, i), dealt out to the experts in turn.

    Where there are not enough for all, every expert gets the n largest.
    """
    flat = size.flatten()
    if n_experts * count > flat.numel():
        return flat.topk(count).indices.expand(n_experts, count).clone()
    return flat.topk(n_experts * count).indices.view(count, n_experts).T.contiguous()


@register_expert("shira", "Bhardwaj et al. 2024, arXiv 2406.13175")
@dataclass(frozen=True, kw_only=True)
class ShiRA(Family):
    """A few entries of the weight, wherever they are: high rank with few parameters, and a switch that is exact.

    Args:
        density: share of the weight's entries that each expert trains; 0 is rank · (o + i) of them, as many as a LoRA
            of that rank has.
        mask: "random" from the seed, the "magnitude" of W0's entries, "structured" (the diagonal, then whole rows and
            columns), or "given": chosen by whoever sets them, such as `moa.training.sparse_entries.choose_entries` by
            gradient or SNIP, and stored.
        seed: of the random places; every layer and expert draws its own.

    Raises:
        ConfigError: an unknown mask, a density outside [0, 1], or more entries than the weight has.

    Differs: peft draws the same places in every layer of one shape, and stores them.
    """

    places = ("input", "output")
    uses = ("rank", "dropout")

    density: float = 0.0
    mask: Mask = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mask not in MASKS:
            raise ConfigError(f"mask must be one of {', '.join(MASKS)}, got {self.mask!r}.")
        check_density(self.density)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with values and places (E, n).

        Raises:
            ConfigError: more entries than the weight has, or no weight to look at.
        """
        size, count = site.d_out * site.d_in, n_entries(site, self.density, options["rank"])
        if self.mask == "magnitude":
            found = largest_places(weight_of(site, self.name).abs(), n_experts, count)
        else:
            draw = generator(self.seed, site.name)
            if self.mask == "structured":
                rows = [structured_places(site.d_out, site.d_in, count, draw) for _ in range(n_experts)]
            else:
                rows = [random_places(size, count, draw) for _ in range(n_experts)]
            found = torch.stack(rows)
        return ShiRABank(site.d_in, site.d_out, found, self.mask == "given", **options)
