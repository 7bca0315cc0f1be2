"""Where the host is the bound: 0.2 B parameters, 1 × 512 tokens. What a layer and a launch cost there, and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moa.kernels.triton import launches
from moa.kernels.triton.decode import mix_few_rows

from ..bench.kernels import make_inputs
from ..bench.model_systems import LINEARS, OURS
from .book import Row
from .end_to_end import BASE, LORA, base_step, ids_of, made
from .launching import apart, direct
from .machine import Machine
from .page import goal
from .shapes import SIZES, TOY

DIRECT = f"{OURS}, direct launches"


def per_layer(machine: Machine) -> dict[str, Any]:
    """Return µs that the host spends on each adapted layer of a training forward and backward beyond the base's."""
    machine.free()
    size = machine.pick(SIZES["0.2 B"], TOY)
    ids = ids_of(machine, size.batch, size.length)
    host: dict[str, float] = {}
    for name, way in ((BASE, False), (OURS, False), (DIRECT, True), (LORA, False)):
        model = made(machine, size, OURS if way else name)
        step = base_step(model, ids) if name == BASE else _plain_step(model, ids)
        with direct(way):
            step()
            host[name] = machine.host_time(step, 10)
    layers = size.layers * len(LINEARS)
    added = {name: (host[name] - host[BASE]) / layers * 1e6 for name in (OURS, DIRECT, LORA)}
    said = ", ".join(f"{name} adds {value:.0f} µs" for name, value in added.items())
    known = added[LORA] > 0  # where it adds less than the clock moves, there is nothing to compare with
    ratios = {name: added[name] / added[LORA] if known else None for name in (OURS, DIRECT)}
    return {
        "host s": host,
        "added us a layer": added,
        "notes": said,
        "goals": [
            goal(f"{name} / peft LoRA r64, host time added", ratio, at_most=2.5) for name, ratio in ratios.items()
        ],
    }


def _plain_step(model: Any, ids: Tensor) -> Callable[[], None]:
    model.train()

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    return step


def training_graph(machine: Machine, name: str) -> dict[str, Any]:
    """Return times of a training step as a call and as a captured graph, forward and backward in one."""
    machine.free()
    size = machine.pick(SIZES["0.2 B"], TOY)
    model = made(machine, size, name)
    ids = ids_of(machine, size.batch, size.length)
    own = [p for p in model.parameters() if p.requires_grad]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    leaves = own or [embedded]

    def step() -> Tensor:
        loss = model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        return torch.autograd.grad(loss, leaves, allow_unused=True)[0]

    captured = machine.capture(step, grad=True)
    return {"times": machine.compare({f"{name}, call": step, f"{name}, graph": captured.replay}, rounds=10)}


def launch(machine: Machine) -> dict[str, Any]:
    """Return µs that the host spends on launches: as Triton launches, and direct, with what is compiled already."""
    n, d = machine.pick((512, 1024), (8, 64))
    given = make_inputs(n, d, dtype=machine.low, device=machine.device)
    x, a, weights = (v.detach() for v in (given.x, given.a, given.weights))
    hidden, mixed = x.new_empty(n, 2, 8), x.new_empty(n, 64)
    out = torch.empty_like(x)
    row, weight, index = (v[:1] for v in (x, weights, given.indices))
    strides = launches.routing_strides(weight, index)
    steps = {
        "shrink": lambda: launches.shrink(x, a, weights, given.indices, hidden, mixed),
        "expand": lambda: launches.expand(mixed, a, None),
        "both of a decoded token": lambda: mix_few_rows(row, a, a, weight, index, None, strides, "ieee"),
    }
    peers = {"copy_ of torch": lambda: out.copy_(x), "mm of torch": lambda: torch.mm(x, a.flatten(0, 1).T, out=mixed)}
    micros: dict[str, float] = {}
    for name, step in {**steps, **peers}.items():
        for way in (False, True) if name in steps else (False,):
            with direct(way):
                for _ in range(machine.pick(20, 1)):
                    step()
                micros[f"{name}, direct" if way else name] = machine.host_time(step, 400) * 1e6
    spared = {name: micros[name] - micros[f"{name}, direct"] for name in steps}
    wins = all(value > 0 for value in spared.values())
    return {
        "us": micros,
        "notes": ", ".join(f"{name} {value:.0f} µs" for name, value in micros.items()),
        "paste": f"DIRECT = {wins}  # launcher.py, if all of `numerics` hold that are launched directly; spares "
        + ", ".join(f"{value:.1f} µs ({name})" for name, value in spared.items()),
    }


def rows(machine: Machine, _: Any) -> Iterator[Row]:
    """Yield the rows."""
    yield Row("a launch", partial(launch, machine), 2)
    yield Row("a layer", partial(per_layer, machine), 8, slow=True)
    for name in (OURS, BASE, LORA):
        yield Row(f"training as a graph, {name}", partial(training_graph, machine, name), 5, kind="training graph")
    yield Row("a launch without the driver", partial(apart, machine.arch), 20, slow=True)
