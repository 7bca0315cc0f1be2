"""Fill triton's cache on all cores before anything waits for it: `python -m experiments.gpu.warm --share 0/16`.

Compiling needs no GPU. A job is what one row will launch; processes share the jobs, and each says what it compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moa.kernels.triton import decode
from moa.recipes import RECIPES

from . import recipes, variants
from .book import Row
from .machine import Machine
from .shapes import (
    ENGINES,
    EVERY_DTYPE,
    LAYER,
    NUMERICS,
    PAST,
    PROMPT,
    REGRET,
    REPLAYED,
    ROUTED,
    SANITIZED,
    SIZES,
    SLOTS,
    Shape,
)
from .tiles import SWEEPS, tiles_kernels


@dataclass(frozen=True)
class Job:
    """What is compiled together.

    Args:
        what: an engine, "routed", "slots", the name of a sweep, "recipe NAME", or "contest NAME".
        shape: of the mixture; a recipe has its own.
        dtype: of the rows.
        tf32: fp32 products run in it.
        backward: with the kernels of the gradients.
    """

    what: str
    shape: Shape = field(default_factory=Shape)
    dtype: str = "bfloat16"
    tf32: bool = False
    backward: bool = True


DTYPES = ("bfloat16", "float16", "float32")


def jobs() -> Iterator[Job]:
    """Yield the jobs of all sections, those that are needed first to begin with."""
    for dtype, tf32 in (*((dtype, False) for dtype in DTYPES), ("float32", True)):
        for name, shape in NUMERICS.items():
            if shape.rows and (dtype == "bfloat16" or name in EVERY_DTYPE):
                for engine in ENGINES:
                    if engine == "triton_concat" or shape.k is not None:
                        yield Job(engine, shape, dtype, tf32)
    for dtype in DTYPES:
        yield from (Job(engine, LAYER, dtype) for engine in ENGINES)
        yield from (Job("routed", replace(ROUTED, n_experts=n), dtype) for n in (8, 16))
        yield Job("slots", SLOTS, dtype)
    for rows, engine in itertools.product(REPLAYED, ENGINES):
        yield Job(engine, replace(NUMERICS["usual"], rows=rows), backward=False)
    yield Job("routed", replace(NUMERICS["usual"], rows=REPLAYED[-1]))
    for shape in SANITIZED:
        yield from (Job(engine, shape) for engine in ENGINES)
        if shape.k is not None and shape.rows > decode.MAX_ROWS:
            yield Job("routed", shape)
    yield from (Job(engine, PAST) for engine in ENGINES)
    usual = Shape()
    yield Job("triton_concat", usual)
    yield Job("routed", usual)
    yield from (Job(engine, replace(usual, n_experts=64, rank=16)) for engine in ENGINES)
    yield from (Job("triton_concat", replace(usual, rows=n), backward=False) for n in (1, 16, decode.MAX_ROWS))
    for size in SIZES.values():
        linears = {(size.width, o) for o in (size.width, size.width // 4, size.inner)} | {(size.inner, size.width)}
        for d_in, d_out in sorted(linears):
            shape = Shape(size.batch * size.length, d_in, d_out)
            yield from (Job(what, shape) for what in ("routed", "triton_concat"))
            for rows in (1, 32, PROMPT, 32 * PROMPT):
                yield Job("triton_concat", replace(shape, rows=rows), backward=False)
    for n_experts, rank, k in REGRET:
        yield from (Job(engine, replace(usual, n_experts=n_experts, rank=rank, k=k)) for engine in ENGINES)
    yield from (Job(f"recipe {name}", dtype=dtype) for name in RECIPES for dtype in ("float32", "bfloat16"))
    yield from (Job(f"contest {name}") for name in variants.ALL)
    yield from (Job(sweep) for sweep in SWEEPS)


def compile_job(job: Job, arch: int) -> list[tuple[str, Any]]:
    """Return the kernels of a job, compiled."""
    from . import compiled  # triton, which must not be imported before the interpreter is off

    dtype = getattr(torch, job.dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = job.tf32
    try:
        if job.what == "routed":
            return compiled.routed_kernels(arch, job.shape, dtype)
        if job.what == "slots":
            return compiled.slot_kernels(arch, job.shape, dtype)
        if job.what in ENGINES:
            return compiled.mixture_kernels(job.what, arch, job.shape, dtype, backward=job.backward)
        with compiled.compile_only(arch) as launched:
            if job.what in SWEEPS:
                tiles_kernels(job.what, job.shape)
            elif job.what.startswith("contest "):
                variants.launch_all(job.what.removeprefix("contest "))
            else:
                recipes.compile_step(job.what.removeprefix("recipe "), dtype)
        return compiled.distinct(launched)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def rows(machine: Machine, _: Any) -> Iterator[Row]:
    """Yield the one row of this section."""
    cores = len(os.sched_getaffinity(0))
    yield Row("kernels", lambda: warm(machine.arch, cores, machine.pick(0, 1)), seconds=20)


def warm(arch: int, processes: int, at_most: int = 0, seconds: float = 75.0, report: bool = False) -> dict[str, Any]:
    """Return how many kernels were compiled, and what failed; processes that take too long are ended.

    Args:
        arch: 90 for compute capability 9.0.
        processes: that share the jobs.
        at_most: so many jobs only; 0: all.
        seconds: for all of it.
        report: say of each kernel what the compiler says, and which does not fit or spills.
    """
    start, environment = time.time(), {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    processes = min(processes, at_most) if at_most else processes
    command = [sys.executable, "-m", "experiments.gpu.warm", "--arch", str(arch), "--at-most", str(at_most)]
    command += ["--report"] if report else []
    running = [
        subprocess.Popen([*command, "--share", f"{n}/{processes}"], env=environment, stdout=subprocess.PIPE, text=True)
        for n in range(processes)
    ]
    compiled, failed, late, notes = 0, [], 0, []
    for process in running:
        try:
            said, _ = process.communicate(timeout=max(0.1, start + seconds - time.time()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, late = process.communicate()[0], late + 1
        for line in said.splitlines():
            found = json.loads(line)
            compiled += found.get("kernels", 0)
            failed += [found] if "error" in found else []
            notes += found.get("notes", [])
        if process.returncode not in (0, -9):
            failed.append({"error": f"a process ended with code {process.returncode}"})
    return {"kernels": compiled, "failed": failed, "late processes": late, "notes": notes, "holds": not failed}


def remarks(job: Job, name: str, kernel: Any, arch: int) -> list[str]:
    """Return what the compiler says of a kernel that spills or competes; of one that does not fit an error.

    A sweep's tiles may spill and may not fit.

    Raises:
        RuntimeError: it asks for more shared memory than a block may have, or a contest's is not what it is called.
    """
    from . import compiled

    said = compiled.report(name, kernel)
    if said.shared > compiled.SHARED_LIMIT[arch] and job.what not in SWEEPS:
        raise RuntimeError(f"{name} of {job} asks for {said.shared} bytes of shared memory")
    if job.what.startswith("contest "):
        if (flaw := variants.flaw(job.what, said)) is not None:
            raise RuntimeError(f"{name} of {job}: {flaw}: {said}")
        with_ops = ", ".join(sorted(said.copies | said.matrix_ops))
        return [f"{job.what}: {name}: {said.registers} registers, {said.shared} shared, {with_ops or 'no products'}"]
    spills = said.spills or said.stack
    where = f"{job.what} {job.dtype}{' tf32' if job.tf32 else ''}, {job.shape}"
    text = f"{name} spills: {said.registers} registers, {said.stack} bytes of stack, {said.shared} shared; {where}"
    return [text] if spills and job.what not in SWEEPS else []


def launcher(kernel: Any) -> None:
    """Build the small C module that launches kernels of this signature: triton builds it at the first launch."""
    from triton.backends.nvidia import driver

    driver.CudaLauncher(kernel.src, kernel.metadata)


def main() -> None:
    """Compile a share of the jobs, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--share", default="0/1", help="N/M: the jobs N, N + M, …")
    parser.add_argument("--at-most", type=int, default=0, help="so many jobs only")
    parser.add_argument("--report", action="store_true", help="say what spills; fail where a kernel does not fit")
    options = parser.parse_args()
    first, step = map(int, options.share.split("/"))
    mine = list(jobs())[: options.at_most or None][first::step]
    for job in mine:
        try:
            kernels = compile_job(job, options.arch)
            if torch.cuda.is_available():
                for _, kernel in kernels:
                    launcher(kernel)
            notes = [r for name, kernel in kernels for r in remarks(job, name, kernel, options.arch) if options.report]
            print(json.dumps({"kernels": len(kernels), "notes": notes}), flush=True)
        except Exception as error:  # noqa: BLE001 - each job says what it came to
            print(json.dumps({"job": str(job), "error": f"{type(error).__name__}: {error}"[:600]}), flush=True)


if __name__ == "__main__":
    main()
