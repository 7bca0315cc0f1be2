"""The routings of one forward, in the order in which the mixtures ran."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from ..types import Routing


class Record(NamedTuple):
    """One call of one mixture: its name, its routing, the rows that count (*rows,) or None for all, its router.

    Where the model runs in n streams, the rows are theirs, one stream after the other.
    """

    name: str
    routing: Routing
    mask: Tensor | None
    router: nn.Module
    n_streams: int = 1


@dataclass
class Trace:
    """An ordered list of `Record`s; give it to `Context.trace` and run a forward.

    Attributes:
        task_ids: (B,) of the batch whose forward is recorded, or None.

    A module that runs several times in one forward (shared layers) is recorded each time.
    """

    records: list[Record] = field(default_factory=list)
    task_ids: Tensor | None = None

    def add(self, name: str, routing: Routing, mask: Tensor | None, router: nn.Module, n_streams: int = 1) -> None:
        """Append one record; `mask` (*rows,) is True on rows that count, which are those of n streams."""
        self.records.append(Record(name, routing, mask, router, n_streams))

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)
