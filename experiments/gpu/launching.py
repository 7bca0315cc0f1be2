"""What Triton does at a launch, beside the direct way to compiled kernels: `python -m experiments.gpu.launching`.

Needs no GPU: kernels are compiled for one, and what would launch them does nothing. So the times are the host's without
the driver's call, and without the two calls of hooks, both empty, that Triton's C code makes and the direct way spares.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.runtime.jit import JITFunction

import moa.kernels.triton as room
from moa.kernels.triton import launcher, routed, triton_concat, triton_grouped
from moa.kernels.triton.launcher import Launcher

from ..bench.common import write
from .compiled import SHARED_LIMIT, Driver
from .shapes import Shape, operands

USUAL = Shape(512, 1024, 1024)
ROUNDS, CALLS = 15, 200


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, its grid, what came by place and by name."""

    kernel: Any  # as triton made it
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    named: dict[str, Any]


class Loading(Driver):
    """A driver of a GPU that is not there: kernels are loaded as if it were, and a launch calls `launch`."""

    def __init__(self, arch: int, launch: Callable[..., None]) -> None:
        super().__init__(arch)
        self.launch, self.stream = launch, 0
        self.utils = self

    def get_current_device(self) -> int:
        """Return a number that no other device has: what is kept by device is not mixed up."""
        return 1000 + self.arch

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return self.launch

    def load_binary(self, *kernel: Any) -> tuple[Any, ...]:
        return object(), object(), 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_LIMIT[self.arch]}


def modules() -> list[ModuleType]:
    """Return the modules of the room."""
    return [importlib.import_module(f"{room.__name__}.{m.name}") for m in pkgutil.iter_modules(room.__path__)]


def launchers() -> dict[str, Launcher]:
    """Return every kernel that the room launches, by its function's name."""
    found = [value for module in modules() for value in vars(module).values() if isinstance(value, Launcher)]
    return {one.kernel.fn.__name__: one for one in found}


@contextmanager
def direct(on: bool) -> Iterator[None]:
    """Let launches go straight to compiled kernels, or not."""
    with mock.patch.object(launcher, "DIRECT", on):
        yield


@contextmanager
def unasked() -> Iterator[None]:
    """Let a launch fail that Triton is asked for: all were to go straight to compiled kernels."""

    def run(self: Any, *arguments: Any, **named: Any) -> None:
        raise AssertionError(f"Triton was asked to launch {self.fn.__name__}: no launch like this was remembered")

    with mock.patch.object(JITFunction, "run", run):
        yield


@contextmanager
def loading(arch: int, launch: Callable[..., None]) -> Iterator[Loading]:
    """Yield a driver whose launches call `launch` instead; afterwards nothing of it is left."""
    driver = Loading(arch, launch)
    with mock.patch.object(triton.runtime.driver, "_active", driver):
        try:
            yield driver
        finally:
            for one in launchers().values():
                unload(one, driver.get_current_device())


def unload(one: Launcher, device: int) -> None:
    """Forget what was compiled for a device, where nothing was loaded that could be unloaded."""
    one.forget()
    kernels, *_ = one.kernel.device_caches.pop(device, [{}])
    for kernel in kernels.values():
        kernel.module = None


def launches_of(shape: Shape, dtype: torch.dtype) -> list[Launch]:
    """Return all launches of a mixture and its gradients by both engines, of its router, of single slots; none runs."""
    found: list[Launch] = []

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append(Launch(self, grid, arguments, named))

    with mock.patch.object(JITFunction, "run", note), direct(False):
        given, grad = operands(shape, dtype)
        for engine in (triton_concat, triton_grouped):
            _, hidden = engine.forward(given)
            engine.backward(grad, given, hidden, [True] * 4)
        gate = torch.empty(shape.n_experts, shape.d_in)
        routed.routed(given.x, gate, given.a, given.b, shape.k or shape.n_experts, 1.0, None, None)
        if given.indices is not None:
            values = triton_grouped.slot_products(given.x, given.a, given.indices)
            triton_grouped.slot_gradients(values, given.x, given.a, given.indices, [True, True])
    return found


def micros(kernel: Launcher, launch: Launch, calls: int = CALLS) -> float:
    """Return the median µs of a launch that is not the first of its kind."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        kernel[launch.grid](*launch.arguments, **launch.named)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e6


def compared(arch: int) -> dict[str, dict[str, float]]:
    """Return kernel -> µs of a launch as Triton launches, and direct: medians of rounds that take turns."""
    found = launches_of(USUAL, torch.bfloat16) + launches_of(Shape(1, 1024, 1024), torch.bfloat16)
    times: dict[str, dict[str, float]] = {}
    with loading(arch, lambda *_: None):
        for name, one in launchers().items():
            launch = next(launch for launch in found if launch.kernel is one.kernel)
            rounds: dict[str, list[float]] = {"triton": [], "direct": []}
            for _ in range(ROUNDS):
                for way, values in rounds.items():
                    with direct(way == "direct"):
                        values.append(micros(one, launch))
            times[name] = {way: statistics.median(values) for way, values in rounds.items()}
    return times


def apart(arch: int) -> dict[str, Any]:
    """Return those times, from a process of its own: an interpreter that is on cannot be switched off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "experiments.gpu.launching", "--arch", str(arch)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    times = json.loads(done.stdout)
    notes = [f"{name}: {way['triton']:.1f} µs, direct {way['direct']:.1f} µs" for name, way in times.items()]
    return {"us": times, "notes": ["the host's part of a launch, without the driver's call: " + "; ".join(notes)]}


def main() -> None:
    """Print the times as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="what kernels are compiled for: 90 is a Hopper GPU")
    parser.add_argument("--keep", action="store_true", help="as a result beside the others as well")
    options = parser.parse_args()
    times = compared(options.arch)
    print(json.dumps(times))
    if options.keep:
        write("launching", {"us": times}, "python -m experiments.gpu.launching --keep")


if __name__ == "__main__":
    main()
