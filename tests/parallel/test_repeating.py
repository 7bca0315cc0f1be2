"""The same seed on the same machine gives the same weights, bit for bit, in several processes, too.

Run: pytest tests/parallel/test_repeating.py; every recipe, a hundred steps, two and four processes: -m slow
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .processes import run_together
from .steps import ONE_EACH

AT_ONCE = 3  # recipes that processes train one after the other before they are waited for no longer
QUICK = ("topk-default", "remix-token")  # one has jitter, the other samples


def trained(
    folder: Path, name: str, world: int, steps: int, cases: tuple[str, ...]
) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Return what all processes end with, whose dicts and sets of text are ordered by a seed of the run's name."""
    seed = str(sum(name.encode()))
    job = "tests.parallel.repeating"
    run_together(job, world, str(folder), name, str(steps), ",".join(cases), PYTHONHASHSEED=seed)
    return [found for rank in range(world) for found in torch.load(folder / f"{name}-{rank}.pt")]


def assert_alike(found: list[tuple[str, dict[str, torch.Tensor]]], n: int) -> None:
    """Fail unless the n runs of each case have the same weights."""
    first = dict(reversed(found))
    for case, expected in first.items():
        runs = [weights for name, weights in found if name == case]
        assert len(runs) == n and expected
        for weights in runs:
            for name, value in expected.items():
                assert torch.equal(weights[name], value), f"{case}: {name} differs between two runs or processes"


def test_two_processes_end_alike_twice(tmp_path: Path) -> None:
    assert_alike(trained(tmp_path, "twice", 2, 4, 2 * QUICK), 4)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("first", range(0, len(ONE_EACH), AT_ONCE))
def test_every_recipe_repeats_a_hundred_steps(first: int, world: int, tmp_path: Path) -> None:
    cases = ONE_EACH[first : first + AT_ONCE]
    found = [run for name in ("first", "again") for run in trained(tmp_path, name, world, 100, cases)]
    assert_alike(found, 2 * world)
