"""The routings of one forward, in the order in which the mixtures ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..types import Routing


class Record(NamedTuple):
    """One call of one mixture.

    Args:
        layer: the mixture.
        routing: of its rows.
        mask: (*rows,) True on the rows that count, or None for all.
        router: that decided.
        n_streams: where the model runs in n streams, the rows are theirs, one stream after the other.
    """

    layer: Any
    routing: Routing
    mask: Tensor | None
    router: nn.Module
    n_streams: int = 1

    @property
    def name(self) -> str:
        """The mixture's name."""
        return str(self.layer.name)


@dataclass(eq=False)
class _Link:
    """A record behind those before it; the first link holds none."""

    record: Record | None = None
    before: _Link | None = None


@dataclass
class Trace:
    """The `Record`s of a forward in order; give it to `Context.trace` and run one.

    Recording reads neither names nor how many records there are: compiled code would be tied to both, and the blocks
    of a stack, each compiled by itself, would need a graph for each.

    Attributes:
        task_ids: (B,) of the batch whose forward is recorded, or None.

    A module that runs several times in one forward (shared layers) is recorded each time.
    """

    task_ids: Tensor | None = None
    _last: _Link = field(default_factory=_Link, init=False, repr=False)

    def add(self, layer: Any, routing: Routing, mask: Tensor | None, router: nn.Module, n_streams: int = 1) -> None:
        """Append one record; `mask` (*rows,) is True on rows that count, which are those of n streams."""
        self._last = _Link(Record(layer, routing, mask, router, n_streams), self._last)

    @property
    def records(self) -> list[Record]:
        """All of them, in order."""
        found, link = [], self._last
        while link.record is not None and link.before is not None:
            found.append(link.record)
            link = link.before
        return found[::-1]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)
