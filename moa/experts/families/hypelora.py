"""HypeLoRA experts: one small network emits the LoRAs of all experts of all layers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ConfigError
from ...kernels.kept import Kept, Tensors, is_at_hand, may_keep
from ...layers import Site
from ..bank import ExpertBank
from ..factored import FactoredBank
from ..family import Family, register_expert
from ..frozen import generator

Down = Literal["generated", "frozen"]
Linear = Callable[[Tensor], Tensor]
Wanted = tuple[str, int, int]  # kind, r and size of factors (E, r, size)


class Hypernetwork(nn.Module):
    """Embeddings (E, d) -> factors (E, r, size): a trunk of linear layers and GELUs, and a last layer for each size.

    Its weights are far larger than what they make, so they are read once for all layers of a model in each forward, or
    generation. Nothing is kept for the next one: a parameter's `data` may be written to, which counts no change.

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
        self._kept, self._users = Kept(), list[HypeLoRABank]()
        self._banks: Sequence[ExpertBank] | None = None  # that the users were found among

    def prepare(self, kind: Literal["down", "up"], rank: int, size: int) -> None:
        """Have the last layer for factors (E, r, size), where the trunk is; the layers of one size share it."""
        name = last_layer((kind, rank, size))
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

    def forward(self, embedding: Tensor, *wanted: Wanted) -> list[Tensor]:
        """Return the factors (E, r, size) of embeddings (E, d).

        Args:
            embedding: of the experts.
            wanted: kind, r and size of each.
        """
        last: Any = self.last
        return emit([embedding], [wanted], self._linears(), {name: last[name] for name in map(last_layer, wanted)})[0]

    def factors(self, bank: HypeLoRABank) -> Tensors:
        """Return the factors (E, r, size) of a bank's experts, made together with those of the model's other layers.

        A bank by itself, one of a model that is not running, or one of parameters that are not at hand as they are
        makes its own, at each call.
        """
        if may_keep(bank.embedding):
            names = [last_layer(one) for one in bank.wanted]
            read = self._weights(names)
            found = self._kept.find(read, bank.embedding)
            if found is None and any(user is bank for user in self._users) and self._make_all():
                found = self._kept.find(read, bank.embedding)
            if found is not None:
                return found
        return self(bank.embedding, *bank.wanted)  # type: ignore[no-any-return]

    def begin(self, banks: Sequence[ExpertBank]) -> None:
        """Take note that a forward, or a generation, begins on a model's banks, (*rows, i) -> (*rows, o)."""
        if banks is not self._banks:
            inner = (module for bank in banks for module in bank.modules())
            self._users = [m for m in inner if isinstance(m, HypeLoRABank) and m.network is self]
            self._banks = banks
        self._kept.end()

    def end(self) -> None:
        """Forget the factors (E, r, size): the forward has ended, and only its backward passes may ask again."""
        self._kept.end()

    def _make_all(self) -> bool:
        """Make the factors (E, r, size) of all users whose embeddings are at hand, if the network is."""
        if not all(map(is_at_hand, self.parameters())):
            return False
        users = [user for user in self._users if is_at_hand(user.embedding)]
        wanted = [user.wanted for user in users]
        names = list(dict.fromkeys(last_layer(one) for each in wanted for one in each))

        def made(shared: Tensors, own: Tensors) -> list[list[Tensor]]:
            layers = [
                functools.partial(F.linear, weight=w, bias=b) for w, b in zip(shared[::2], shared[1::2], strict=True)
            ]
            n_trunk = len(layers) - len(names)
            return emit(own, wanted, layers[:n_trunk], dict(zip(names, layers[n_trunk:], strict=True)))

        self._kept.make(self._weights(names), [user.embedding for user in users], made)
        return True

    def _linears(self) -> list[Any]:
        return [layer for layer in self.trunk if isinstance(layer, nn.Linear)]

    def _weights(self, names: Sequence[str]) -> list[Tensor]:
        """Return weight and bias of the trunk's layers and of some last ones, in order."""
        last: Any = self.last
        return [t for layer in (*self._linears(), *(last[n] for n in names)) for t in (layer.weight, layer.bias)]


def last_layer(wanted: Wanted) -> str:
    """Return the name of the last layer for factors (E, r, size)."""
    kind, rank, size = wanted
    return f"{kind}_{rank}x{size}"


def emit(
    embeddings: Tensors, wanted: Sequence[Sequence[Wanted]], trunk: Sequence[Linear], last: Mapping[str, Linear]
) -> list[list[Tensor]]:
    """Return the factors (E, r, size) of each layer's embeddings (E, d): one product for each linear layer.

    Args:
        embeddings: of each layer.
        wanted: of each layer, kind, r and size of its factors.
        trunk: linear layers, a GELU behind each.
        last: the layer for each kind, r and size, by name.
    """
    hidden = torch.cat(list(embeddings))  # (Σ E, d)
    for linear in trunk:
        hidden = F.gelu(linear(hidden))  # (Σ E, width)
    parts = hidden.split([len(embedding) for embedding in embeddings])
    users: dict[Wanted, list[int]] = {}
    for layer, each in enumerate(wanted):
        for one in each:
            users.setdefault(one, []).append(layer)
    made: dict[tuple[Wanted, int], Tensor] = {}
    for one, layers in users.items():
        rows = torch.cat([parts[layer] for layer in layers])
        factors = last[last_layer(one)](rows).unflatten(-1, one[1:])  # (Σ E, r, size)
        for layer, factor in zip(layers, factors.split([len(parts[layer]) for layer in layers]), strict=True):
            made[one, layer] = factor
    return [[made[one, layer] for one in each] for layer, each in enumerate(wanted)]


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
        """Return down (E, r, i) and up (E, r, o), as the network makes them."""
        found = self.network.factors(self)
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
