"""A short sweep of each kernel's tiles at the usual size: the winners, as a table to paste into the size functions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from moa.kernels import Operands
from moa.kernels.triton import decode, launches, routed, triton_grouped
from moa.kernels.triton.thin import Sizes

from .book import Row
from .machine import Machine, Step
from .shapes import Shape, operands

MANY = {"n_experts": 64, "rank": 16}  # the columns at which the grouped engine is used
AT_MOST = 8.0  # seconds of one sweep
# kernel -> the module and the name of the function that gives its sizes, and the tiles to try: rows, features (columns,
# where None, are left as they are), warps, stages.
GRID = dict[str, tuple[Any, str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]]]
SWEEPS: GRID = {
    "shrink": (launches, "shrink_sizes", ((32, 64, 128), (64, 128), (4, 8), (3, 4))),
    "unmix": (launches, "shrink_sizes", ((32, 64, 128), (64, 128), (4, 8), (2, 3))),
    "expand": (launches, "expand_sizes", ((64, 128), (64, 128, 256), (4, 8), (2, 3))),
    "gram": (launches, "gram_sizes", ((32, 64, 128), (64, 128, 256), (4, 8), (3, 4))),
    "routed": (routed, "routed_sizes", ((32, 64, 128), (64, 128), (4, 8), (2, 3))),
    "grouped shrink": (triton_grouped, "shrink_sizes", ((32, 64, 128), (64, 128), (4,), (3, 4))),
    "grouped expand": (triton_grouped, "expand_sizes", ((64, 128), (64, 128, 256), (4, 8), (2,))),
    "grouped gram": (triton_grouped, "gram_sizes", ((32, 64, 128), (64, 128, 256), (4,), (2, 3))),
    "decode shrink": (decode, "shrink_sizes", ((16,), (64, 128, 256), (2, 4), (2, 3, 4))),
    "decode expand": (decode, "expand_sizes", ((16,), (16, 32, 64, 128), (2, 4), (2, 3))),
}


def step(sweep: str, given: Operands, grad: torch.Tensor) -> Step:
    """Return a launch of one kernel, with what it needs around it."""
    x, a, b, weights, indices = given[:5]
    assert indices is not None
    n_rows, k = weights.shape
    columns = a.shape[0] * a.shape[1]
    hidden, mixed = x.new_empty(n_rows, k, a.shape[1]), x.new_empty(n_rows, columns)
    if x.is_cuda:
        hidden, mixed = torch.randn_like(hidden), torch.randn_like(mixed)
    if sweep.startswith("grouped"):
        groups = triton_grouped.Groups(weights, indices, a.shape[0], a.shape[1])
        return {
            "grouped shrink": lambda: groups.shrink(x, a),
            "grouped expand": lambda: groups.expand(hidden, b, None),
            "grouped gram": lambda: groups.gram(hidden, x, a),
        }[sweep]
    gate = torch.zeros(a.shape[0], x.shape[1], device=x.device)
    strides = launches.routing_strides(weights, indices)
    return {
        "shrink": lambda: launches.shrink(x, a, weights, indices, hidden, mixed),
        "unmix": lambda: launches.unmix(grad, b, weights, indices, hidden, True, True, True),
        "expand": lambda: launches.expand(mixed, b, None),
        "gram": lambda: launches.gram(mixed, grad, b),
        "routed": lambda: routed.routed(x, gate, a, b, k, 1.0, None, None),
        "decode shrink": lambda: decode.mix_few_rows(x, a, b, weights, indices, None, strides, "ieee"),
        "decode expand": lambda: decode.mix_few_rows(x, a, b, weights, indices, None, strides, "ieee"),
    }[sweep]


def shape_of(sweep: str, shape: Shape) -> Shape:
    """Return the sizes at which a kernel is swept."""
    if sweep.startswith("decode"):
        return replace(shape, rows=1)
    return replace(shape, **MANY) if sweep.startswith("grouped") else shape


def candidates(sweep: str, fixed: Sizes, itemsize: int = 2) -> list[Sizes]:
    """Return the tiles to try, the fixed ones first."""
    _, _, grid = SWEEPS[sweep]
    found = [Sizes(t, fixed.block_c, d, w, s) for t, d, w, s in itertools.product(*grid)]
    return [fixed, *(size for size in found if size != fixed)]


def fixed_sizes(sweep: str, shape: Shape, itemsize: int) -> Sizes:
    """Return the tiles that a kernel has now."""
    module, name, _ = SWEEPS[sweep]
    columns = shape.n_experts * shape.rank
    if sweep.startswith("grouped"):
        arguments: tuple[int, ...] = (shape.rank, itemsize)
    else:
        arguments = {
            "gram": (columns, itemsize),
            "decode shrink": (shape.rows, itemsize),
        }.get(sweep, (shape.rows, columns, itemsize))
    found: Sizes = getattr(module, name)(*arguments)
    return found


def with_sizes(sweep: str, size: Sizes, run: Callable[[], Any]) -> Any:
    """Return what a launch returns with other tiles than the fixed ones."""
    module, name, _ = SWEEPS[sweep]
    with mock.patch.object(module, name, lambda *_: size):
        return run()


def tiles_kernels(sweep: str, shape: Shape) -> None:
    """Launch a kernel with every candidate, where launches are only compiled."""
    shape = shape_of(sweep, shape)
    run = step(sweep, *operands(shape, torch.bfloat16))
    for size in candidates(sweep, fixed_sizes(sweep, shape, 2)):
        with_sizes(sweep, size, run)


def sweep_rows(machine: Machine, sweep: str) -> dict[str, Any]:
    """Return every candidate's time, the fastest first, and what it gains over the fixed tiles."""
    shape = shape_of(sweep, Shape())
    shape = machine.pick(shape, shape.toy())
    given, grad = operands(shape, machine.low, machine.device)
    run = step(sweep, given, grad)
    fixed = fixed_sizes(sweep, shape, given.x.itemsize)
    tried, found, begun = candidates(sweep, fixed), [], time.time()
    for size in machine.pick(tried, tried[:2]):
        if not machine.toy and time.time() - begun > AT_MOST:
            break  # where nothing is compiled yet, one sweep would take the time of all
        times = machine.compare({"it": partial(with_sizes, sweep, size, run)}, rounds=9, warmup=2)["it"]
        found.append({"sizes": astuple(size), **times})
    able = [one for one in found if "median_ms" in one]
    able.sort(key=lambda one: one["median_ms"])
    now = found[0]
    if not able:
        raise RuntimeError(f"no tiles of {sweep} can be launched; {now['error']}")
    return {
        "fixed": now,
        "best": able[0],
        "fixed_over_best": now["median_ms"] / able[0]["median_ms"] if now in able else None,
        "paste": f"Sizes{able[0]['sizes']}  # {sweep}, {shape}",
        "tried": able[:8],
        "no room": [one["sizes"] for one in found if "error" in one],
        "no time": len(tried) - len(found),
    }


def rows(machine: Machine, _: Any) -> Iterator[Row]:
    """Yield one row for each kernel."""
    for sweep in SWEEPS:
        yield Row(sweep, partial(sweep_rows, machine, sweep), seconds=4, kind="sweep")
