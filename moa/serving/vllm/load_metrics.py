"""The routing's load in the engine's `/metrics`: the server's side of `routing_load`, which imports nothing heavy."""

from __future__ import annotations

import atexit
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VARIABLE = "MOA_ROUTING_LOAD"  # names a folder; processes that the engine starts inherit it
METRIC, HELP = "moa_routing_rows", "Rows that went to an expert, in a sample of one batch a second."


@functools.cache
def announce() -> None:
    """Choose the folder in an engine's main process, and show it in that process's metrics; no tensors.

    What another engine's process has handed down in the environment is not this one's.
    """
    if multiprocessing.parent_process() is not None and VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="moa-routing-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = folder
    from prometheus_client import REGISTRY

    REGISTRY.register(LoadCollector(Path(folder)))


class LoadCollector:
    """Shows the files of `RoutingLoad` as a counter by layer and expert: the sum over a process's engines.

    Args:
        folder: may be empty yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def describe(self) -> list[Any]:
        """Return nothing: what there is, is known when a model runs."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the counter; no tensors."""
        from prometheus_client.core import CounterMetricFamily

        counter = CounterMetricFamily(METRIC, HELP, labels=["layer", "expert"])
        totals: dict[tuple[str, int], int] = {}
        for file in sorted(self.folder.glob("*.json")):
            for layer, counts in json.loads(file.read_text()).items():
                for expert, count in enumerate(counts):
                    totals[layer, expert] = totals.get((layer, expert), 0) + count
        for (layer, expert), total in totals.items():
            counter.add_metric([layer, str(expert)], total)
        yield counter
