"""DeepSpeed's ZeRO-2 and ZeRO-3 learn what one process does. Needs `make env-deepspeed`; every recipe: -m slow"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import moa

from .processes import ROOT, run_together
from .steps import ONE_EACH, STEPS, base_of, by_task, learned, model_of, optimizer_of, same_draws, take_step
from .test_processes import alone

PYTHON = ROOT / ".envs" / "deepspeed" / "bin" / "python"
PAGE = ROOT / "docs" / "scaling.md"
QUICK = ("topk-default", "sigmoid-default", "xlora-default", "mixlora-default", "remix-token")
TOLERANCE = 2e-5  # of how far a weight moved: two steps in fp32 against fp64
ROUNDING = 4  # times what one process in fp32 is off, where that is more: its sums have another order
pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="no DeepSpeed here: make env-deepspeed")


def plans(folder: Path) -> list[str]:
    """Return the files of the configurations that the page shows, as they stand there."""
    files = []
    for name, text in re.findall(r"```json\n// (zero\d\.json)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        plan = json.loads(text)
        if plan["zero_optimization"]["stage"] == 3:
            plan["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # these are all small
        files.append(str(folder / name))
        Path(files[-1]).write_text(json.dumps({**plan, "zero_allow_untested_optimizer": True}))
    return files


def in_fp32(case: str) -> dict[str, torch.Tensor]:
    """Return what one process learns in fp32, on the batches of two."""
    model = model_of(case).float()
    optimizer = optimizer_of(model)
    with same_draws():
        for step in range(STEPS):
            take_step(model, optimizer, step, 2, None, by_task(case))
    return learned(model)


def check(folder: Path, cases: tuple[str, ...]) -> None:
    """Fail unless each case learns by each plan of the page what one process learns."""
    files = plans(folder)
    assert [Path(file).stem for file in files] == ["zero2", "zero3"]
    run_together("tests.parallel.zero", 2, str(folder), ",".join(files), ",".join(cases), python=PYTHON)
    for case in cases:
        before, expected, rounded = learned(model_of(case)), alone(case, 2), in_fp32(case)
        for file in files:
            got = torch.load(folder / f"{case}-{Path(file).stem}.pt")
            assert got.keys() == expected.keys()
            read = learned(moa.load(folder / f"{case}-{Path(file).stem}", base_of(case).float()))
            for name, value in got.items():
                assert torch.equal(read[name], value), (case, Path(file).stem, name, "as saved")
            for name, value in expected.items():
                if value.is_floating_point():
                    moved = (value - before[name]).abs().max().item()
                    error = (got[name].double() - value).abs().max().item()
                    own = (rounded[name].double() - value).abs().max().item()
                    rounding = 1e-6 * value.abs().max().item()  # of fp32 at the weight's own size
                    most = max(TOLERANCE * moved + rounding, ROUNDING * own)
                    assert error <= most, (case, Path(file).stem, name, error, moved, own)
                else:
                    assert torch.equal(got[name], value), (case, name)


def test_zero_learns_what_one_process_does(tmp_path: Path) -> None:
    """Selection biases move, too: no gradient does it, and the engine's optimizer holds no parameter of the model."""
    check(tmp_path, QUICK)


@pytest.mark.slow
def test_zero_learns_every_recipe(tmp_path: Path) -> None:
    check(tmp_path, ONE_EACH)
