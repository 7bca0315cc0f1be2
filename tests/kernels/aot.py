"""Compile Triton kernels ahead of time, without a GPU, and read the compiler's own report."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
# What one block may use: 163, 227, 227 and 99 KiB.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


# Run-time integers that launchers pass as multiples of 16 at the sizes tested, which the JIT would find by itself.
ALIGNED = ("d", "stride_x", "stride_grad", "stride_right", "size", "d_per_split", "rows_per_split")


@dataclass(frozen=True)
class Report:
    """What the compiler says of one kernel on one architecture."""

    registers: int
    spills: int  # bytes of stack
    local: int  # loads and stores of local memory in the machine code
    shared: int  # bytes
    tensor_ops: frozenset[str]  # mnemonics of matrix instructions, e.g. HGMMA.64x64x16.F32.BF16


def compile_kernel(kernel, pointers: dict[str, str], constants: dict[str, object], arch: int, warps: int, stages: int):
    """Return the report of `kernel` compiled for sm_`arch`.

    Args:
        kernel: a `triton.jit` function.
        pointers: type of each pointer argument, e.g. "*bf16"; all other run-time arguments are i32.
        constants: value of each constexpr argument; None makes a pointer absent.
        arch: 80, 90, 100 or 120.
        warps: warps of a block.
        stages: pipeline stages.
    """
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "i32")
            if name in pointers or name in ALIGNED:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "-res-usage", str(cubin))
        code = _run("nvdisasm", "-c", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Report(
        registers=int(found[1]),
        spills=int(found[2]),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        tensor_ops=frozenset(re.findall(r"\b((?:HGMMA|HMMA|UTCHMMA|UTCQMMA|OMMA|QMMA)[\w.]*)", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, env=environment, check=True)
    return done.stdout
