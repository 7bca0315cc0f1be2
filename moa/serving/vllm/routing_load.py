"""How evenly a running engine's experts are used, as metrics: the workers write a sample, the server reads it.

The engine's model lives in a process of its own, its `/metrics` in another: a small file is between them. Mixtures only
leave the weights of their latest batch; once a second a thread counts those, so that a step pays for nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...formats.atomic import replacing
from ...types import Routing
from .load_metrics import VARIABLE

EVERY = 1.0  # seconds
_numbers = itertools.count()  # of the engines in this process


class RoutingLoad:
    """Counts rows by layer and expert; a `Recorder` of mixtures.

    Args:
        file: written to by `publish`.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self.latest: dict[tuple[str, ...], Routing] = {}
        self.counts: dict[str, Tensor] = {}

    def add(self, layer: Any, routing: Routing, mask: Tensor | None, router: nn.Module, n_streams: int = 1) -> None:
        """Keep a routing of one mixture's rows (*rows, E) until it is counted, or until the next."""
        self.latest[layer.name,] = routing

    def keep(self, names: tuple[str, ...], weights: Tensor) -> None:
        """Keep the weights (T, P, E) of P mixtures that see the same rows."""
        self.latest[names] = Routing(weights, None, weights.shape[-1])

    def publish(self) -> None:
        """Count what is new, and write the counts (E,) of every layer."""
        for names in list(self.latest):
            routing = self.latest.pop(names)
            counts = routing.selected().reshape(-1, len(names), routing.n_experts).sum(0).cpu()  # (P, E)
            for name, count in zip(names, counts, strict=True):
                self.counts[name] = self.counts.get(name, 0) + count
        with replacing(self.file) as temporary:
            temporary.write_text(json.dumps({name: count.tolist() for name, count in self.counts.items()}))

    @classmethod
    def of_engine(cls, config: Any) -> RoutingLoad | None:
        """Return one that publishes into the folder that `announce` chose, or None where it chose none; no tensors.

        None, too, where graphs are replayed: a replayed step passes this by, and the counts would be those of the
        rest.

        Args:
            config: of the engine.
        """
        mode = getattr(config.compilation_config, "cudagraph_mode", None)
        if VARIABLE not in os.environ or getattr(mode, "name", "NONE") != "NONE":
            return None
        load = cls(Path(os.environ[VARIABLE]) / f"{os.getpid()}-{next(_numbers)}.json")
        load.start()
        return load

    def start(self) -> None:
        """Publish once a second from a thread of its own, for as long as this process lives; no tensors."""

        def run() -> None:
            while True:
                time.sleep(EVERY)
                with torch.inference_mode():
                    self.publish()

        threading.Thread(target=run, name="moa routing load", daemon=True).start()
