"""How a mixture sits on a layer that tensor parallelism cuts: it sees whole rows, and the layer keeps its shard.

Column parallel: x is whole, y0 is a shard of o. Row parallel: x is a shard of i, y0 is whole after the layer's own
reduction. The experts are replicated: they are a few thousandths of a layer. So every router and every family works
as it is, and each rank forms the same routing from the same whole row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...mixture import Branch, Mixture
from ...mixture.blocks import BlockEntry, BlockExit
from .axis import Axis
from .routing_load import RoutingLoad
from .stacked import MOST_ROWS, Stacked, alike


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
        load: where the routing's load is counted, or None.

    Attributes:
        stacked: the mixtures as one, for few rows, or None where they are not alike.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        x_axis: Axis,
        parts: Sequence[Part],
        bias: Callable[[], Tensor | None] = lambda: None,
        load: RoutingLoad | None = None,
    ) -> None:
        self.run, self.x_axis, self.parts, self.load = run, x_axis, list(parts), load
        self._names = tuple(part.mixture.name for part in self.parts if part.mixture is not None)
        self._fused: list[Tensor] = []
        self.stacked = self._stack()
        for number, part in enumerate(self.parts):
            if part.mixture is not None:
                part.mixture.base = EngineBase(self._base(number), bias)

    def _stack(self) -> Stacked | None:
        """Return the mixtures as one where all are alike, else None: then each runs by itself."""
        starts = itertools.accumulate((part.axis.size for part in self.parts), initial=0)
        found = []
        for start, part in zip(starts, self.parts, strict=False):
            if part.mixture is None:
                continue
            if type(part.mixture) is not Mixture or len(part.mixture.branches) != 1:
                return None
            found.append((cast(Branch, part.mixture.branches[0]), slice(start, start + part.axis.size), part.axis))
        branches, slices, axes = zip(*found, strict=True)
        return Stacked(branches, slices, axes) if alike(branches) else None

    def _base(self, number: int) -> Callable[[Tensor], Tensor]:
        axis = self.parts[number].axis
        if len(self.parts) > 1:
            return lambda x: axis.whole(self._fused[number])
        return lambda x: axis.whole(self.run(self.x_axis.own(x)))

    def __call__(self, x: Tensor) -> Tensor:
        """Return this rank's shard of the output, (*rows, o'), with what the mixtures add, of its shard of x."""
        x = self.x_axis.whole(x)
        if self.stacked is not None and x.shape[:-1].numel() <= MOST_ROWS:
            y = self.run(self.x_axis.own(x))
            weights = self.stacked.add_to(y.flatten(0, -2), x.flatten(0, -2))
            if self.load is not None:
                self.load.keep(self._names, weights)
            return y
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
