"""One axis of features of a layer that tensor parallelism cuts over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

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
