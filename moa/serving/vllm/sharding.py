"""How a mixture sits on a layer that tensor parallelism cuts: it sees whole rows, and the layer keeps its shard.

Column parallel: x is whole, y0 is a shard of o. Row parallel: x is a shard of i, y0 is whole after the layer's own
reduction. The experts are replicated: they are a few thousandths of a layer. So every router and every family works
as it is, and each rank forms the same routing from the same whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...mixture import Mixture
from ...mixture.blocks import BlockEntry, BlockExit

Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Axis:
    """One axis of features, cut over ranks.

    Args:
        size: features of this rank's shard.
        ranks: over how many it is cut; 1 is whole.
        rank: this one.
        copies: how many neighbouring ranks hold the same shard, as key and value heads that are fewer than ranks.
        gather: (*rows, size) -> (*rows, ranks · size), the shards of all ranks in order.
    """

    size: int
    ranks: int = 1
    rank: int = 0
    copies: int = 1
    gather: Gather = field(default=lambda x: x, compare=False)

    def whole(self, shard: Tensor) -> Tensor:
        """Return the whole features (*rows, d) of this rank's shard (*rows, size)."""
        if self.ranks == 1:
            return shard
        every = self.gather(shard)
        if self.copies == 1:
            return every
        return every.unflatten(-1, (self.ranks, self.size))[..., :: self.copies, :].flatten(-2)

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's shard (*rows, size) of whole features (*rows, d)."""
        return whole if self.ranks == 1 else whole.narrow(-1, self.rank // self.copies * self.size, self.size)


@dataclass(frozen=True)
class Part:
    """One original layer i -> o among those that the engine has fused: its mixture, or None, and its shard of o."""

    mixture: Mixture | None
    axis: Axis


class EngineBase(nn.Module):
    """What a mixture has for its base: the engine's layer, (*rows, i) -> (*rows, o), whole on both sides."""

    def __init__(self, call: Callable[[Tensor], Tensor], bias: Callable[[], Tensor | None]) -> None:
        super().__init__()
        self._call, self._bias = call, bias

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (o,), or None."""
        return self._bias()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (*rows, o) of x (*rows, i)."""
        return self._call(x)


class ServedLayer:
    """A layer of the engine with the mixtures of the layers that it stands for.

    Args:
        run: the engine's own forward, shard (*rows, i') -> shard (*rows, o').
        x_axis: how i is cut.
        parts: the original layers in the order of its output.
        bias: gives the bias of a layer that is not fused.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        x_axis: Axis,
        parts: Sequence[Part],
        bias: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        self.run, self.x_axis, self.parts = run, x_axis, list(parts)
        self._fused: list[Tensor] = []
        for number, part in enumerate(self.parts):
            if part.mixture is not None:
                part.mixture.base = EngineBase(self._base(number), bias)

    def _base(self, number: int) -> Callable[[Tensor], Tensor]:
        axis = self.parts[number].axis
        if len(self.parts) > 1:
            return lambda x: axis.whole(self._fused[number])
        return lambda x: axis.whole(self.run(self.x_axis.own(x)))

    def __call__(self, x: Tensor) -> Tensor:
        """Return this rank's shard of the output, (*rows, o'), with what the mixtures add, of its shard of x."""
        x = self.x_axis.whole(x)
        if len(self.parts) > 1:
            self._fused = list(self.run(self.x_axis.own(x)).split([part.axis.size for part in self.parts], -1))
        found = [self._part(number, part, x) for number, part in enumerate(self.parts)]
        self._fused = []
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def _part(self, number: int, part: Part, x: Tensor) -> Tensor:
        return self._fused[number] if part.mixture is None else part.axis.own(part.mixture(x))

    def like(self, x: Tensor) -> Tensor:
        """Return an empty tensor of the shape that `__call__` returns for x: a block's slots open and close here."""
        mixture = self.parts[0].mixture
        rows: tuple[int, ...] = tuple(x.shape[:-1])
        if isinstance(mixture, BlockEntry):
            rows = (*rows, mixture.branch.router.k)
        elif isinstance(mixture, BlockExit):
            rows = rows[:-1]
        return x.new_empty(*rows, sum(part.axis.size for part in self.parts))
