"""HypeLoRA experts: one small network emits the LoRAs of all experts of all layers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ...layers import Site
from ..bank import ExpertBank
from ..factored import FactoredBank
from ..family import Family, register_expert
from ..frozen import generator

Down = Literal["generated", "frozen"]


class Hypernetwork(nn.Module):
    """Embeddings (E, d) -> factors (E, r, size): a trunk of linear layers and GELUs, and a last layer for each size.

    Args:
        d_embedding: d.
        width: of the inner layers.
        depth: linear layers, the last included.
    """

    def __init__(self, d_embedding: int, width: int, depth: int) -> None:
        super().__init__()
        sizes = [d_embedding] + [width] * (depth - 1)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.width, self.trunk, self.last = width, nn.Sequential(*layers), nn.ModuleDict()

    def prepare(self, kind: Literal["down", "up"], rank: int, size: int) -> None:
        """Have the last layer for factors (E, r, size), where the trunk is; the layers of one size share it."""
        name = f"{kind}_{rank}x{size}"
        if name not in self.last:
            like = next(self.trunk.parameters())
            layer = nn.Linear(self.width, rank * size, device=like.device, dtype=like.dtype)
            self.last[name] = layer.requires_grad_(like.requires_grad)
            self._draw_last(name)

    def _draw_last(self, name: str) -> None:
        layer: Any = self.last[name]
        kind, _, size = name.partition("_")
        nn.init.zeros_(layer.bias)
        if kind == "up":
            nn.init.zeros_(layer.weight)
        else:  # entries of down as large as in a LoRA, ±1/√i
            nn.init.normal_(layer.weight, std=1 / math.sqrt(self.width * int(size.partition("x")[2])))

    def reset_parameters(self) -> None:
        """Draw all layers anew; what ups (E, r, o) come from is zero."""
        for layer in self.trunk:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        for name in self.last:
            self._draw_last(name)

    def forward(self, embedding: Tensor, *wanted: tuple[str, int, int]) -> list[Tensor]:
        """Return the factors (E, r, size) of embeddings (E, d).

        Args:
            embedding: of the experts.
            wanted: kind, r and size of each.
        """
        hidden = self.trunk(embedding)  # (E, width)
        return [self.last[f"{kind}_{rank}x{size}"](hidden).unflatten(-1, (rank, size)) for kind, rank, size in wanted]


class HypeLoRABank(FactoredBank):
    """E low-rank experts whose factors a network makes of an embedding: down_e, up_e = h(embedding_e).

    | tensor | shape | start |
    |---|---|---|
    | embedding | (E, d) | N(0, 1) |
    | network | one for all layers | its last layer for ups zero |
    | down | (E, r, i) | with down="frozen": uniform ±1/√i from the seed, not trained and not saved |

    Args:
        site: its layer (i -> o).
        n_experts: E.
        network: h.
        family: its keywords.
        options: as in `ExpertBank`.

    Source: HypeLoRA, see `HypeLoRA`.
    """

    per_expert: ClassVar[tuple[str, ...]] = ("embedding", "down")

    down: Tensor | None

    def __init__(self, site: Site, n_experts: int, network: Hypernetwork, family: HypeLoRA, **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.family, self.name, self.network = family, site.name, network
        self.wanted = [("up", self.rank, self.d_out)]
        network.prepare("up", self.rank, self.d_out)
        if family.down == "generated":
            network.prepare("down", self.rank, self.d_in)
            self.wanted.insert(0, ("down", self.rank, self.d_in))
        self._draw(n_experts)

    def _draw(self, n_experts: int) -> None:
        self.n_experts = n_experts
        self.embedding = nn.Parameter(torch.randn(n_experts, self.family.d_embedding))
        down: Tensor | None = None
        if self.family.down == "frozen":
            uniform = torch.rand(n_experts, self.rank, self.d_in, generator=generator(self.family.seed, self.name))
            down = (2 * uniform - 1) / math.sqrt(self.d_in)  # (E, r, i)
        self.register_buffer("down", down, persistent=False)

    def reset_parameters(self) -> None:
        """Draw the embeddings (E, d) and the network anew, which other layers use too."""
        nn.init.normal_(self.embedding)
        self.network.reset_parameters()

    def stack(self, n_matrices: int) -> None:
        """Become the experts of N matrices (o, i), each with an embedding of its own."""
        self._draw(n_matrices * self.n_experts)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i) and up (E, r, o), made at each call."""
        found = self.network(self.embedding, *self.wanted)
        return found[0] if self.down is None else self.down, found[-1]


@register_expert("hypelora", "Trojan and Gębala 2026, arXiv 2603.19278")
@dataclass(frozen=True, kw_only=True)
class HypeLoRA(Family):
    """LoRAs that one network emits for all experts of all layers, each from an embedding of its own.

    Args:
        d_embedding: numbers that an expert of a layer has of its own.
        width: of the network's inner layers.
        depth: its linear layers, at least 2.
        down: "generated", or "frozen" at random values, which calibrates better and fits a little worse.
        seed: of frozen downs.

    Raises:
        ConfigError: a size below 1, fewer than two layers, or an unknown down.
    Source: arXiv 2603.19278, as its released code has it: a layer's embedding, through an MLP, becomes its factors.
    Differs: there a layer has an embedding, here each expert of a layer has one. There the factors made are blended
        with a LoRA's first ones (one blend, "multiply", is zero for ever); here the network's last layer starts at
        zero, so that the model starts as its base and every part learns. A last layer for each size of layer, where
        there all layers have one size.
    """

    d_embedding: int = 128
    width: int = 2048
    depth: int = 2
    down: Down = "generated"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("d_embedding", 1), ("width", 1), ("depth", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if self.down not in ("generated", "frozen"):
            raise ConfigError(f"down must be 'generated' or 'frozen', got {self.down!r}.")

    def shared(self, sites: Any, **options: Any) -> nn.Module:
        """Return the network, (E, d) -> (E, r, i) and (E, r, o)."""
        return Hypernetwork(self.d_embedding, self.width, self.depth)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with embeddings (E, d) on the network that all layers share."""
        network = shared if isinstance(shared, Hypernetwork) else Hypernetwork(self.d_embedding, self.width, self.depth)
        return HypeLoRABank(site, n_experts, network, self, **options)
