"""Rows that fail, for a rehearsal: one raises, one hangs, one ends its process, one loses the device, one is well."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .book import PATIENCE, Row


@dataclass(frozen=True)
class Hanging(Row):
    """A row that is soon taken to hang."""

    @property
    def limit(self) -> float:
        """Half a second, in a rehearsal."""
        return 0.5 / PATIENCE


def rows(_: Any, __: Any) -> Iterator[Row]:
    """Yield them."""

    def raises() -> None:
        raise ValueError("as it should")

    def loses() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    yield Row("raises", raises)
    yield Hanging("hangs", lambda: time.sleep(60))
    yield Row("ends the process", lambda: os._exit(17))
    yield Row("loses the device", loses)
    yield Row("is well", lambda: {"answer": 42})
    yield Row("has no time", lambda: None, seconds=1e9)
