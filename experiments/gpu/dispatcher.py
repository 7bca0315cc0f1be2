"""Does the dispatcher choose well: both engines on 18 shapes, its regret, its constants fitted to what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from moa.kernels import choose_engine, low_rank_mixture
from moa.kernels.dispatch import _GPU_COLUMNS_ALWAYS

from ..bench.kernels import make_inputs, train_step
from .book import Row
from .machine import Machine
from .page import goal
from .shapes import REGRET, ROWS, D

ENGINES = ("triton_concat", "triton_grouped")
Times = dict[tuple[int, int, int], dict[str, float]]


def shape(machine: Machine, n_experts: int, rank: int, k: int) -> dict[str, Any]:
    """Return both engines' times on one shape, and the chosen one's over the better one's."""
    n, d = machine.pick((ROWS, D), (40, 64))
    given = make_inputs(n, d, *machine.pick((n_experts, rank), (4, 4)), k, dtype=machine.low, device=machine.device)
    steps = {engine: train_step(partial(low_rank_mixture, engine=engine), given) for engine in ENGINES}
    times = machine.compare(steps, rounds=10)
    both = {engine: times[engine]["median_ms"] for engine in ENGINES}
    chosen = choose_engine(ROWS, D, D, n_experts, rank, k, torch.bfloat16, "cuda")
    return {
        "times": times,
        "shape": [n_experts, rank, k],
        "chosen": chosen,
        "regret": both.get(chosen, both[ENGINES[0]]) / min(both.values()),
    }


def fit(machine: Machine, found: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the worst regret, and the columns per active expert at which it would be least."""
    shapes = [row["found"] for row in found().values() if "shape" in row.get("found", {})]
    measured: Times = {
        tuple(row["shape"]): {engine: row["times"][engine]["median_ms"] for engine in ENGINES} for row in shapes
    }

    def regret(columns: int, always: int) -> float:
        worst = 1.0
        for (n_experts, rank, k), times in measured.items():
            dense = n_experts * rank <= max(always, columns * k)
            worst = max(worst, times[ENGINES[0] if dense else ENGINES[1]] / min(times.values()))
        return worst

    tried = [(regret(c, a), c, a) for c in range(20, 1200, 20) for a in (0, 64, 128, 256, 512, 1024)]
    least = min(tried)[0]
    # Of the constants that are as good, those in the middle: they are farthest from where the choice changes.
    good = sorted((c, a) for value, c, a in tried if value <= least * 1.001)
    columns, always = good[len(good) // 2]
    now = [times[_chosen(*key)] / min(times.values()) for key, times in measured.items()]
    return {
        "goals": [goal(f"worst regret of {len(measured)} shapes", max(now), at_most=1.15)],
        "fitted regret": least,
        "paste": [f"_GPU_COLUMNS = {{{machine.arch // 10}: {columns}}}", f"_GPU_COLUMNS_ALWAYS = {always}"],
        "notes": f"with the fitted constants the worst regret is {least:.3f}; always is {_GPU_COLUMNS_ALWAYS} now",
    }


def _chosen(n_experts: int, rank: int, k: int) -> str:
    chosen = choose_engine(ROWS, D, D, n_experts, rank, k, torch.bfloat16, "cuda")
    return chosen if chosen in ENGINES else ENGINES[0]


def rows(machine: Machine, found: Callable[[], dict[str, Any]]) -> Iterator[Row]:
    """Yield a row for each shape, and one that fits the constants to them."""
    for n_experts, rank, k in REGRET:
        yield Row(f"{n_experts} x {rank}, k {k}", partial(shape, machine, n_experts, rank, k), 1.5, kind="shape")
    yield Row("constants", partial(fit, machine, found), 0.1)
