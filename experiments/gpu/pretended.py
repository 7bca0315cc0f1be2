"""A device that is not there: what `Machine` asks of `torch.cuda`, with the same names and arguments, on a CPU.

`tests/systems/test_gpu_rehearsal.py` holds every function to the signature of the one that it stands for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moa.kernels import dispatch

from .machine import Captured, Machine

ATEN = torch.ops.aten
WAITING = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
    ATEN.lift_fresh.default,  # a tensor made of the host's numbers: a copy that waits
}


class Event:
    """A point in time."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Event:
        return super().__new__(cls)

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: Event) -> float:
        return (end_event.at - self.at) * 1000


class Stream:
    """A queue of work that is done at once."""

    def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Stream:
        return super().__new__(cls)

    def wait_stream(self, stream: Any) -> None:
        pass


class CUDAGraph:
    """A graph that holds nothing: see `Rehearsal.captured`."""

    def __new__(cls, keep_graph: bool = False) -> CUDAGraph:
        return super().__new__(cls)

    def replay(self) -> None:
        pass


class NoWaiting(TorchDispatchMode):
    """What waits for the device raises, as in a graph that is captured: a tensor read on the host, sizes that depend on
    values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or raise."""
        if func in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func} waits for the device")
        return func(*args, **(kwargs or {}))


class Cuda:
    """The part of `torch.cuda` that `Machine` uses."""

    Event, Stream, CUDAGraph = Event, Stream, CUDAGraph

    @staticmethod
    def synchronize(device: Any = None) -> None:
        pass

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def memory_allocated(device: Any = None) -> int:
        return 0

    @staticmethod
    def max_memory_allocated(device: Any = None) -> int:
        return 0

    @staticmethod
    def reset_peak_memory_stats(device: Any = None) -> None:
        pass

    @staticmethod
    def get_device_capability(device: Any = None) -> tuple[int, int]:
        return 9, 0

    @staticmethod
    def get_device_name(device: Any = None) -> str:
        return "rehearsal"

    @staticmethod
    def current_stream(device: Any = None) -> Stream:
        return Stream()

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream | None) -> Iterator[None]:
        yield

    @staticmethod
    @contextlib.contextmanager
    def graph(
        cuda_graph: CUDAGraph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True)
        captured = mock.patch("moa.model.learned.is_captured", lambda _: True)
        with NoWaiting(), capturing, captured, mock.patch("moa.kernels.ops.check_range"):  # a GPU leaves the check out
            yield


@dataclass
class Again(Captured):
    """What calls the function again, into the same output."""

    grad: bool

    def replay(self) -> None:
        """Replay, and do what a graph would have done."""
        super().replay()
        with torch.set_grad_enabled(self.grad):
            self.output.copy_(self.function().detach())


class Rehearsal(Machine):
    """A CPU with Triton's interpreter in the place of a GPU: every branch, toy sizes, no figure that means anything."""

    device = "cpu"
    toy = True
    low = torch.float16  # the interpreter computes no bf16
    cuda = Cuda()
    backend = "aot_eager"
    seconds_of_a_step = 0.1

    def captured(self, graph: Any, output: Tensor, function: Callable[[], Tensor], grad: bool) -> Captured:
        """Return what calls the function again."""
        return Again(graph, output, function, grad)


def choose_as_on_a_gpu() -> None:
    """Let the sizes choose engines as on a GPU, for the rest of this process."""

    def choose(*sizes: Any) -> str:
        return dispatch._choose_cuda(sizes[0], *sizes[3:7], torch.device("cuda"))

    dispatch.choose_engine = choose
