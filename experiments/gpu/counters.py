"""What the kernels of a layer reach on the device, and what bounds them: what NVIDIA's ncu counts of one launch each.

`python -m experiments.gpu.counters` is the program that ncu runs: T 8192, d 4096, bf16, 8 experts of rank 8, k 2; one
row for decoding's two; 64 experts of rank 16 for the grouped engine's; cuBLAS's product of the frozen base beside them.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

from . import ncu, pretended_ncu
from .book import Row
from .machine import Machine
from .ncu import Counted
from .page import number

# The kernel's name -> what it is called here; cuBLAS's has a name of its own in every version.
KERNELS = {
    "shrink_kernel": "shrink",
    "routed_shrink_kernel": "shrink with its router",
    "expand_kernel": "expand",
    "unmix_kernel": "unmix",
    "gram_kernel": "gram",
    "add_splits_kernel": "gram, adding its splits",
    "partial_shrink_kernel": "decode, shrink",
    "gated_expand_kernel": "decode, expand",
    "grouped_shrink_kernel": "grouped shrink",
    "grouped_expand_kernel": "grouped expand",
    "combine_kernel": "grouped expand, adding slots",
    "grouped_gram_kernel": "grouped gram",
    "add_chunks_kernel": "grouped gram, adding its chunks",
}
BASE = "base product of cuBLAS"
SWEEPS = ("shrink", "routed", "unmix", "gram", "decode shrink", "grouped shrink", "grouped expand", "grouped gram")
SECONDS = 25.0  # of which the program begins no launch in the last GRACE
GRACE = 5.0
BUSY = 0.6  # of a limit: Nsight Compute's own rule for what bounds a kernel
FEW_WARPS = 25.0  # % of what an SM holds


def bound(found: Counted, copy: float | None) -> str:
    """Return what bounds a kernel, in words.

    Args:
        found: its counters.
        copy: bytes per second of a large copy on this device, where they were measured.
    """
    memory, tensor, caches = share(found, copy), found.get("tensor %"), found.get("memory %")
    if memory is None and tensor is None:
        return "what bounds it was not counted"
    if (memory or 0.0) >= BUSY and (memory or 0.0) >= (tensor or 0.0) / 100:
        return "memory bounds it"
    if (tensor or 0.0) >= 100 * BUSY:
        return "the tensor cores bound it"
    if (caches or 0.0) >= 100 * BUSY:
        return "the caches bound it, not the memory behind them"
    if found.get("waves", 1.0) < 1.0:
        return f"too few blocks bound it: {number(found['waves'])} of what the device holds"
    if found.get("warps %", 100.0) < FEW_WARPS:
        held = ", ".join(f"{number(found[key])} {key}" for key in ("registers", "shared bytes") if key in found)
        return f"latency bounds it, with too few warps to hide it ({held})"
    waits = {label: size for label, size in found.items() if label.startswith("waits for ")}
    return f"latency bounds it: a warp mostly {max(waits, key=waits.__getitem__)}" if waits else "latency bounds it"


def speed(found: Counted) -> float | None:
    """Return bytes per second between the device's memory and its caches."""
    needed = ("seconds", "bytes read", "bytes written")
    if any(key not in found for key in needed) or not found["seconds"]:
        return None
    return (found["bytes read"] + found["bytes written"]) / found["seconds"]


def share(found: Counted, copy: float | None) -> float | None:
    """Return the memory's speed over a copy's, or the share of its peak where no copy was measured."""
    reached = speed(found)
    if reached is not None and copy:
        return reached / copy
    return found["DRAM %"] / 100 if "DRAM %" in found else None


def line(found: Counted, copy: float | None) -> dict[str, float]:
    """Return a kernel's line of the page's table of times."""
    shown = {"median_ms": found.get("seconds", 0.0) * 1e3}
    for key, figure in (("GB/s", speed(found)), ("of a copy" if copy else "of the peak", share(found, copy))):
        if figure is not None:
            shown[key] = figure / 1e9 if key == "GB/s" else figure
    shown |= {key: found[key] for key in ("tensor %", "warps %", "L2 hits %", "waves", "registers") if key in found}
    if "local loads" in found:
        shown["spilled"] = found["local loads"] + found.get("local stores", 0.0)
    if found.get("shared wavefronts"):
        shown["conflicts over wavefronts"] = found.get("bank conflicts", 0.0) / found["shared wavefronts"]
    return shown


def summary(launches: list[tuple[str, Counted]], missing: list[str], copy: float | None) -> dict[str, Any]:
    """Return every kernel's counters, and of the three slowest of moa a sentence each.

    Args:
        launches: kernel and counters, in their order.
        missing: counters that ncu does not have here.
        copy: bytes per second of a large copy.
    """
    kernels: dict[str, Counted] = {}
    for name, found in launches:
        kernels.setdefault(KERNELS.get(name, f"{BASE}, {name}"), found)
    own = [name for name in kernels if name in KERNELS.values()]
    slowest = sorted(own, key=lambda name: -kernels[name].get("seconds", 0.0))[:3]
    times = {name: line(found, copy) for name, found in kernels.items()}
    notes = [f"{name}: {sentence(times[name], bound(kernels[name], copy))}" for name in slowest]
    late = [label for label in KERNELS.values() if label not in kernels]
    notes += [f"not counted, for want of time: {', '.join(late)}"] if late else []
    notes += [f"ncu does not have {', '.join(missing)} here"] if missing else []
    return {
        "times": times,
        "bound": {name: bound(found, copy) for name, found in kernels.items()},
        "notes": notes,
        "counted": kernels,
    }


def sentence(shown: dict[str, float], bound: str) -> str:
    """Return the figures of a kernel and what bounds it."""
    words = {
        "GB/s": "{} GB/s",
        "of a copy": "{} of a copy",
        "of the peak": "{} of the peak",
        "tensor %": "tensor cores {} % busy",
        "warps %": "{} % of the warps",
        "spilled": "{} spilled loads and stores",
    }
    said = [words[key].format(number(shown[key])) for key in words if key in shown]
    return f"{number(shown['median_ms'] * 1e3)} µs, {', '.join(said)}: {bound}"


def copied(tables: dict[str, Any]) -> float | None:
    """Return bytes per second of the copy that the section `table` measured."""
    times = tables.get("ceilings", {}).get("found", {}).get("times", {})
    found = times.get("copy of 2 GiB", {}).get("GB/s")
    return None if found is None else found * 1e9


def profiled(machine: Machine, command: list[str], tables: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ncu counts of the program.

    Raises:
        NotCounted: ncu is not here, or counts nothing.
    """
    machine.free()
    seconds = machine.pick(SECONDS, 300.0)
    program = [sys.executable, "-m", "experiments.gpu.counters", "--until", str(time.time() + seconds - GRACE)]
    found, missing = ncu.profile(command, program + (["--toy"] if machine.toy else []), seconds)
    return summary(found, missing, copied(tables()))


def rows(machine: Machine, found: Callable[..., dict[str, Any]]) -> Iterator[Row]:
    """Yield the one row of this section; in a rehearsal with ncu's stand-in, and one for each way in which it fails."""
    tables = partial(found, "table")
    if not machine.toy:
        yield Row("ncu, one launch", partial(profiled, machine, ["ncu"], tables), SECONDS)
        return
    yield Row("ncu, one launch", partial(profiled, machine, pretended_ncu.command("well"), tables), kind="well")
    for way in pretended_ncu.WAYS:
        yield Row(f"ncu that {way}", partial(pretended_ncu.tried, way), kind=way)


def main() -> None:
    """Launch every kernel once, after it was warmed up, while ncu counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--until", type=float, required=True, help="no launch is begun after it")
    options = parser.parse_args()

    import torch

    from moa.kernels.triton import triton_grouped

    from . import tiles
    from .shapes import Shape, operands

    device, dtype = ("cpu", torch.float16) if options.toy else ("cuda", torch.bfloat16)
    shapes = {sweep: tiles.shape_of(sweep, Shape()) for sweep in SWEEPS}
    if options.toy:
        shapes = {sweep: shape.toy() for sweep, shape in shapes.items()}
    given = {shape: operands(shape, dtype, device) for shape in shapes.values()}
    # The tiles of each expert are counted once: small kernels of torch, which are not what is looked at.
    ends = functools.cache(triton_grouped.Groups.ends)
    steps = {sweep: tiles.step(sweep, *given[shape]) for sweep, shape in shapes.items()}
    x = given[shapes["shrink"]][0].x
    weight, y = torch.randn(x.shape[1], x.shape[1]).to(x), torch.empty_like(x)
    steps[BASE] = lambda: torch.mm(x, weight.T, out=y)
    profiling: AbstractContextManager[Any] = nullcontext() if options.toy else torch.cuda.profiler.profile()
    with mock.patch.object(triton_grouped.Groups, "ends", lambda groups, step: ends(groups, step)):
        for step in steps.values():
            step()
        if not options.toy:
            torch.cuda.synchronize()
        with profiling:
            for name, step in steps.items():
                if time.time() > options.until:
                    print(f"no time for {name}")
                    break
                step()
    print("all kernels ran")


if __name__ == "__main__":
    main()
