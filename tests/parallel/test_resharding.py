"""torch's distributed checkpoint under FSDP2: saved by two processes, loaded by one, three and four, bit for bit.

Run: pytest tests/parallel/test_resharding.py; all recipes: -m slow
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .processes import run_together
from .resharding import load
from .steps import ONE_EACH, learned, model_of, optimizer_of

QUICK = ("topk-default", "xlora-default", "hydra-default")
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what loading in one process says
JOB = "tests.parallel.resharding"


def saved(folder: Path, cases: tuple[str, ...]) -> dict[str, Any]:
    """Return the whole state of each case as two processes have saved it."""
    run_together(JOB, 2, str(folder), "save", ",".join(cases))
    return {case: torch.load(folder / f"{case}-save-2.pt") for case in cases}


def assert_same(got: Any, expected: Any, place: str) -> None:
    """Fail unless nested values are the same, tensors bit for bit."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same(got[key], value, f"{place}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert got.dtype == expected.dtype and torch.equal(got, expected), place
    else:
        assert got == expected, place


def check(folder: Path, cases: tuple[str, ...], worlds: tuple[int, ...]) -> None:
    """Fail unless one process, and as many as `worlds` says, load what two have saved."""
    expected = saved(folder, cases)
    for case in cases:
        model = model_of(case)
        before = learned(model)
        load(model, optimizer_of(model), folder / case)
        state = model.state_dict()
        assert_same(state, expected[case]["model"], case)
        assert any(not torch.equal(value, before[name]) for name, value in learned(model).items()), case
    for world in worlds:
        run_together(JOB, world, str(folder), "load", ",".join(cases))
        for case in cases:
            assert_same(torch.load(folder / f"{case}-load-{world}.pt"), expected[case], f"{case} in {world}")


@ALONE
def test_two_processes_save_what_one_and_four_load(tmp_path: Path) -> None:
    check(tmp_path, QUICK, (4,))


@ALONE
@pytest.mark.slow
def test_every_recipe_is_resharded(tmp_path: Path) -> None:
    """Three processes divide no tensor of these evenly: the last one holds less, or nothing."""
    check(tmp_path, ONE_EACH, (3, 4))
