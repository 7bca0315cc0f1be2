"""What a layer adds to decoding: 1, 16 and 64 rows, as a captured graph on cold weights and as a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moa.kernels import Gate, gated_linear, mixture_linear

from ..bench.kernel_baselines import plain_concat
from ..bench.kernels import make_inputs
from .book import Row
from .machine import Machine
from .page import goal
from .shapes import D

LAYERS = 24  # of one graph: their weights together are more than a cache holds


def decode(machine: Machine, n_rows: int) -> dict[str, Any]:
    """Return µs of a layer, forward, and what moa adds to the frozen base."""
    d, layers = machine.pick(D, 64), machine.pick(LAYERS, 2)
    low, device = machine.low, machine.device
    given = [make_inputs(n_rows, d, dtype=low, device=device) for _ in range(layers)]
    bases = [torch.randn(d, d, dtype=low, device=device) / d**0.5 for _ in range(layers)]
    gates = [torch.randn(8, d, device=device) / d**0.5 for _ in range(layers)]
    x = given[0].x.detach()

    def chain(layer: Callable[[Tensor, int], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            y = x
            for n in range(layers):
                y = layer(y, n)
            return y

        return run

    def mixed(y: Tensor, n: int) -> Tensor:
        own = given[n]
        return mixture_linear(y, bases[n], None, own.a, own.b, own.weights, own.indices)

    def routed(y: Tensor, n: int) -> Tensor:
        return gated_linear(y, bases[n], None, Gate(gates[n], 2), given[n].a, given[n].b)[0]

    def plain(y: Tensor, n: int) -> Tensor:
        own = given[n]
        return F.linear(y, bases[n]) + plain_concat(y, own.a, own.b, own.weights, own.indices)

    def lora(y: Tensor, n: int) -> Tensor:
        own = given[n]
        return F.linear(y, bases[n]) + 2.0 * ((y @ own.a.flatten(0, 1).T) @ own.b.flatten(0, 1))

    chains = {
        "frozen base": chain(lambda y, n: F.linear(y, bases[n])),
        "moa, routing given": chain(mixed),
        "moa with its router": chain(routed),
        "LoRA r64, as peft forms it": chain(lora),
        "plain concat": chain(plain),
    }
    graphs = {name: machine.capture(run) for name, run in chains.items()}
    times = machine.compare({f"graph, {name}": graph.replay for name, graph in graphs.items()})

    def call(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    host = {name: machine.host_time(partial(call, run)) / layers * 1e6 for name, run in chains.items()}
    for name in chains:
        times[f"graph, {name}"]["us a layer"] = times[f"graph, {name}"]["median_ms"] / layers * 1e3
        times[f"graph, {name}"]["host us a call"] = host[name]
    base = times["graph, frozen base"]["us a layer"]
    added = {name: times[f"graph, {name}"]["us a layer"] - base for name in chains}
    goals = [
        goal(f"{name} adds µs", added[name], at_most=5.0) for name in ("moa, routing given", "moa with its router")
    ]
    return {"times": times, "added us": added, "goals": goals}


def rows(machine: Machine, _: Any) -> Iterator[Row]:
    """Yield a row for each number of rows."""
    for n_rows in (1, 16, 64):
        yield Row(f"{n_rows} rows", partial(decode, machine, n_rows), 5, kind="decode")
