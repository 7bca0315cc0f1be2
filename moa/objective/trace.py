"""The routings of one forward, in the order in which the mixtures ran."""

from __future__ import annotations

from collections.abc import Iterator
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


class _Link:
    """What a record is made of (its fields), behind those before it; the first link holds nothing."""

    def __init__(self, fields: tuple[Any, ...] = (), before: _Link | None = None) -> None:
        self.fields, self.before = fields, before


class Trace:
    """The `Record`s of a forward in order; give it to `Context.trace` and run one.

    Recording reads neither names nor how many records there are: compiled code would be tied to both, and the blocks
    of a stack, each compiled by itself, would need a graph for each.

    Attributes:
        task_ids: (B,) of the batch whose forward is recorded, or None.

    A module that runs several times in one forward (shared layers) is recorded each time.
    """

    def __init__(self) -> None:
        self.task_ids: Tensor | None = None
        self._last = _Link()
        self._listed: _Link | None = None  # the last link that is in the list
        self._list: list[Record] = []

    def add(self, layer: Any, routing: Routing, mask: Tensor | None, router: nn.Module, n_streams: int = 1) -> None:
        """Append one record; `mask` (*rows,) is True on rows that count, which are those of n streams."""
        self._last = _Link((layer, routing, mask, router, n_streams), self._last)

    @property
    def records(self) -> list[Record]:
        """All of them, in order."""
        return [*iter(self)]

    def __iter__(self) -> Iterator[Record]:
        if self._listed is not self._last:
            found: list[Record] = []
            link = self._last
            while link.before is not None:
                found.append(Record(*link.fields))
                link = link.before
            found.reverse()
            self._listed, self._list = self._last, found
        return iter(self._list)

    def __bool__(self) -> bool:
        return self._last.before is not None

    def __len__(self) -> int:
        return len(self.records)
