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

VARIABLE = "MOA_ROUTING_LOAD"  # names the file; processes that the engine starts inherit it
METRIC, HELP = "moa_routing_rows", "Rows that went to an expert, in a sample of one batch a second."


@functools.cache
def announce() -> None:
    """Choose the file in an engine's main process, and show it in that process's metrics; no tensors.

    What another engine's process has handed down in the environment is not this one's.
    """
    if multiprocessing.parent_process() is not None and VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="moa-routing-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[VARIABLE] = str(Path(folder) / "load.json")
    from prometheus_client import REGISTRY

    REGISTRY.register(LoadCollector(Path(os.environ[VARIABLE])))


class LoadCollector:
    """Shows a file of `RoutingLoad` as a counter by layer and expert.

    Args:
        file: may not be there yet.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def describe(self) -> list[Any]:
        """Return nothing: what there is, is known when a model runs."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the counter; no tensors."""
        from prometheus_client.core import CounterMetricFamily

        counter = CounterMetricFamily(METRIC, HELP, labels=["layer", "expert"])
        if self.file.is_file():
            for layer, counts in json.loads(self.file.read_text()).items():
                for expert, count in enumerate(counts):
                    counter.add_metric([layer, str(expert)], count)
        yield counter
