"""The device that is measured: timing on a cold cache, captured graphs, peak memory. A rehearsal puts a pretended one
in its place (`pretended.py`), so that every line of this file runs without a GPU as well.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .book import is_lost

T = TypeVar("T")
Step = Callable[[], Any]
_FLUSH = 512 << 20  # int32 values: 2 GB, many times any L2 cache; the host issues a step while they are written


@dataclass
class Captured:
    """A graph that holds a call, what the call returned, and the call: a replay reads the memory that it reads."""

    graph: Any
    output: Tensor
    function: Callable[[], Tensor]

    def replay(self) -> None:
        """Run the captured calls again on what their inputs hold now."""
        self.graph.replay()


class Machine:
    """A GPU that torch sees.

    Args:
        seconds_of_a_step: rounds of a comparison stop when its steps have taken so long, each.
    """

    device = "cuda"
    toy = False
    low = torch.bfloat16
    cuda: Any = torch.cuda
    backend = "inductor"
    seconds_of_a_step = 1.0

    def pick(self, real: T, toy: T) -> T:
        """Return what is measured, or its small stand-in in a rehearsal."""
        return toy if self.toy else real

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes that kernels are checked in; the interpreter computes no bf16."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        return {names[d]: d for d in dict.fromkeys((self.low, torch.float16, torch.float32))}

    @property
    def arch(self) -> int:
        """The compute capability as triton names it, 90 for 9.0."""
        major, minor = self.cuda.get_device_capability()
        return 10 * int(major) + int(minor)

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """Return a function under torch's compiler, for static shapes."""
        return torch.compile(function, backend=self.backend, dynamic=False)

    def compare(self, steps: dict[str, Step], rounds: int = 20, warmup: int = 3) -> dict[str, dict[str, Any]]:
        """Return name -> median, least and spread of device time in ms, and peak memory beyond what is held.

        Steps are interleaved, in another order each round, each on a cold L2 cache. One that fails carries its error,
        and the others are compared without it.

        Raises:
            Exception: what a step raised, where the device is lost by it.
        """
        found: dict[str, dict[str, Any]] = {}
        for name, step in steps.items():
            found[name] = self._warm(step, warmup)
        left = [name for name in steps if "error" not in found[name]]
        flush = torch.empty(self.pick(_FLUSH, 64), dtype=torch.int32, device=self.device)
        times: dict[str, list[float]] = {name: [] for name in left}
        order = random.Random(0)
        for round_ in range(self.pick(rounds, 1)):
            order.shuffle(left)
            for name in left:
                spent = sum(times[name]) / 1000
                if round_ >= 3 and spent > self.seconds_of_a_step:
                    continue
                flush.zero_()
                times[name].append(self._once(steps[name]))
        for name, values in times.items():
            spread = {"least_ms": min(values), "spread_ms": max(values) - min(values), "rounds": len(values)}
            found[name] = {"median_ms": statistics.median(values), **spread, **found[name]}
        return found

    def _warm(self, step: Step, warmup: int) -> dict[str, Any]:
        self.cuda.synchronize()
        held = self.cuda.memory_allocated()
        self.cuda.reset_peak_memory_stats()
        try:
            for _ in range(self.pick(warmup, 1)):
                step()
            self.cuda.synchronize()
        except Exception as error:
            if is_lost(error):
                raise
            self.cuda.empty_cache()
            return {"error": (str(error).splitlines() or [type(error).__name__])[0]}
        return {"peak_mib": (self.cuda.max_memory_allocated() - held) / 2**20}

    def _once(self, step: Step) -> float:
        start, stop = (self.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    def host_time(self, step: Step, calls: int = 30) -> float:
        """Return the median seconds that the host needs to issue a step, the device left to run behind."""
        times = []
        for _ in range(self.pick(calls, 1)):
            self.cuda.synchronize()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        self.cuda.synchronize()
        return statistics.median(times)

    def capture(self, function: Callable[[], Tensor], grad: bool = False) -> Captured:
        """Return a graph of one call; what it has to warm up is run before.

        Args:
            function: to capture.
            grad: it forms gradients.
        """
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream), torch.set_grad_enabled(grad):
            for _ in range(self.pick(3, 1) if grad else 1):
                function()
        self.cuda.current_stream().wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        with torch.set_grad_enabled(grad), self.cuda.graph(graph):
            output = function()
        return self.captured(graph, output.detach(), function, grad)

    def captured(self, graph: Any, output: Tensor, function: Callable[[], Tensor], grad: bool) -> Captured:
        """Return what replays; a device that is not there has to call the function again."""
        return Captured(graph, output, function)

    def free(self) -> None:
        """Give cached memory back."""
        self.cuda.synchronize()
        gc.collect()
        self.cuda.empty_cache()


def over(found: dict[str, dict[str, Any]], one: str, other: str) -> float | None:
    """Return the ratio of two medians, None where one was not measured."""
    times = [found.get(name, {}).get("median_ms") for name in (one, other)]
    return None if None in times else times[0] / times[1]
