"""Compile Triton kernels through their real launchers, without a GPU, and read the compiler's own report."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from moa.kernels import Operands
from moa.kernels.triton import routed, triton_concat, triton_grouped

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
# What one block may use: 163, 227, 227 and 99 KiB.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@dataclass(frozen=True)
class Report:
    """What the compiler says of one launched kernel on one architecture."""

    name: str
    registers: int
    stack: int  # bytes
    spills: int  # loads and stores of local memory in the machine code
    shared: int  # bytes
    matrix_ops: frozenset[str]  # mnemonics, e.g. HGMMA.64x64x16.F32.BF16


class _Driver:
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
def compile_only(arch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """Yield a list that fills with the kernels that launchers would launch on sm_`arch`; none of them runs."""
    launched: list = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        launched.append((self.fn.__name__, kernel))
        return kernel

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", _Driver(arch))
        patch.setattr(JITFunction, "run", compile_instead)
        for module in (triton_concat, triton_grouped, routed):
            patch.setattr(module, "rows_of", lambda values: values)
        yield launched


def reports(
    engine: ModuleType,
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    n_rows: int = 8192,
    d_in: int = 1024,
    d_out: int = 512,
    n_experts: int = 8,
    rank: int = 8,
    k: int | None = 2,
    dtype: torch.dtype = torch.bfloat16,
    with_bias: bool = False,
    with_backward: bool = True,
) -> list[Report]:
    """Return one report for each distinct kernel of a forward (and a backward) with these sizes."""
    x, a, b = (torch.empty(s, dtype=dtype) for s in ((n_rows, d_in), (n_experts, rank, d_in), (n_experts, rank, d_out)))
    weights = torch.empty(n_rows, k or n_experts)
    indices = None if k is None else torch.zeros(n_rows, k, dtype=torch.int64)
    bias = torch.empty(d_out, dtype=dtype) if with_bias else None
    with compile_only(arch, monkeypatch) as launched:
        operands = Operands(x, a, b, weights, indices, None, bias)
        y, hidden = engine.forward(operands)
        if with_backward:
            engine.backward(y, operands, hidden, [True] * 4)
    distinct = {kernel.hash: (name, kernel) for name, kernel in launched}
    return [_report(name, kernel) for name, kernel in distinct.values()]


def routed_reports(
    arch: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    n_experts: int = 8,
    rank: int = 8,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Report]:
    """Return one report for each distinct kernel of a forward whose router rides in the shrink, k = 2."""
    x, a, b = (torch.empty(s, dtype=dtype) for s in ((8192, 1024), (n_experts, rank, 1024), (n_experts, rank, 512)))
    with compile_only(arch, monkeypatch) as launched:
        routed.routed(x, torch.empty(n_experts, 1024), a, b, 2, 1.0, None, None)
    distinct = {kernel.hash: (name, kernel) for name, kernel in launched}
    return [_report(name, kernel) for name, kernel in distinct.values()]


def _report(name: str, kernel) -> Report:
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
    )


def _run(tool: str, *arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, env=environment, check=True)
    return done.stdout
