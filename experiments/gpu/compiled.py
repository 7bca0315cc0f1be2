"""Compile Triton kernels through their real launchers, without a GPU, and read the compiler's own report."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moa.kernels.triton import launcher, routed, triton_concat, triton_grouped

from .shapes import Shape, operands

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
# What one block may use: 163, 227, 227 and 99 KiB.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
ENGINES = {"triton_concat": triton_concat, "triton_grouped": triton_grouped}
Launched = list[tuple[str, Any]]


@dataclass(frozen=True)
class Report:
    """What the compiler says of one launched kernel on one architecture."""

    name: str
    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of local memory in the machine code
    shared: int  # bytes
    matrix_ops: frozenset[str]  # mnemonics, e.g. HGMMA.64x64x16.F32.BF16
    copies: frozenset[str]  # what brings tiles into shared memory: UTMALDG.2D, the copy engine; LDGSTS.E.BYPASS.128
    apart: bool  # some warps do nothing but bring tiles


class Driver:
    """A driver of a GPU that is not there: it names the architecture, and nothing can be launched on it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device: one device for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compile_only(arch: int) -> Iterator[Launched]:
    """Yield a list that fills with the kernels that launchers would launch on sm_`arch`; none of them runs."""
    launched: Launched = []
    run = JITFunction.run

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launcher, "DIRECT", False))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", Driver(arch)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_instead))
        yield launched


def distinct(launched: Launched) -> Launched:
    """Return each compiled kernel once."""
    return list({kernel.hash: (name, kernel) for name, kernel in launched}.values())


def mixture_kernels(
    engine: str, arch: int, shape: Shape, dtype: torch.dtype, bias: bool = False, backward: bool = True
) -> Launched:
    """Return the distinct kernels of a forward (and a backward) of one mixture."""
    given, grad = operands(shape, dtype)
    given = given._replace(bias=torch.empty(shape.d_out, dtype=dtype) if bias else None)
    with compile_only(arch) as launched:
        _, hidden = ENGINES[engine].forward(given)
        if backward:
            ENGINES[engine].backward(grad, given._replace(bias=None), hidden, [True] * 4)
    return distinct(launched)


def routed_kernels(arch: int, shape: Shape, dtype: torch.dtype, gate_dtype: torch.dtype = torch.float32) -> Launched:
    """Return the distinct kernels of a forward whose router rides in the shrink."""
    given, _ = operands(shape, dtype)
    with compile_only(arch) as launched:
        gate = torch.empty(shape.n_experts, shape.d_in, dtype=gate_dtype)
        routed.routed(given.x, gate, given.a, given.b, shape.k or shape.n_experts, 1.0, None, None)
    return distinct(launched)


def slot_kernels(arch: int, shape: Shape, dtype: torch.dtype) -> Launched:
    """Return the distinct kernels of `grouped_linear` and its gradients."""
    given, _ = operands(shape, dtype)
    assert given.indices is not None
    with compile_only(arch) as launched:
        y = triton_grouped.slot_products(given.x, given.a, given.indices)
        triton_grouped.slot_gradients(y, given.x, given.a, given.indices, [True, True])
    return distinct(launched)


def report(name: str, kernel: Any) -> Report:
    """Return what the compiler says of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Report(
        name=name,
        registers=int(found[1]),
        stack=int(found[2]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=kernel.metadata.shared,
        matrix_ops=frozenset(re.findall(r"\b((?:HGMMA|HMMA|UTCHMMA)[\w.]*)", code)),
        copies=frozenset(re.findall(r"\b((?:UTMALDG|LDGSTS)[\w.]*)", code)),
        apart="ttg.warp_specialize" in kernel.asm["ttgir"],
    )


def reports(make: Callable[..., Launched], *args: Any, **kwargs: Any) -> list[Report]:
    """Return a report of each kernel that `make`, one of the functions above, compiles."""
    return [report(name, kernel) for name, kernel in make(*args, **kwargs)]


def _run(tool: str, *arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, env=environment, check=True)
    return done.stdout
