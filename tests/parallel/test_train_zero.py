"""`moa train` by DeepSpeed, stopped and resumed. Needs `make env-deepspeed`; what runs the engine: -m slow"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moa.errors import ConfigError
from moa.runs.engines import check_engine, stage_of
from moa.training.checkpoints import is_whole, newest_checkpoint

from .processes import PATIENCE, environment
from .test_train import TORCHRUN, assert_run_of_one, said, values_of, write
from .test_zero import PYTHON, plans

PLANS = ("zero2", "zero3")
needs_engine = pytest.mark.skipif(not PYTHON.is_file(), reason="no DeepSpeed here: make env-deepspeed")


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two processes trained by each plan, were stopped, refused to go on and went on."""
    folder = tmp_path_factory.mktemp("zero")
    commands: list[Any] = []
    for file in plans(folder):
        values = values_of(folder, 8, Path(file).stem)
        values["training"] |= {"deepspeed": file}
        good = write(folder, f"{Path(file).stem}.yaml", values)
        commands += [(["train", good], (6, "ctrl-c")), (["train", good, "--resume"], None)]
    commands.append((["train", good, "--set", "overwrite=true", "--set", "compare={}"], None))
    commands.append((["train", good], None))
    (folder / "commands.json").write_text(json.dumps(commands))
    command = [str(PYTHON), *TORCHRUN[1:], "-m", "tests.parallel.zero_commands", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE)
    assert (folder / "said-0.json").is_file(), done.stderr[-6000:]
    return folder


@needs_engine
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")  # routers start uneven here
@pytest.mark.parametrize("plan", PLANS)
def test_two_processes_end_where_one_does(plan: str, launched: Path, tmp_path: Path) -> None:
    """Scores before and after are those of one process, too: a run has one engine after the other."""
    number = 2 * PLANS.index(plan)
    codes, lines = said(launched, number)
    assert 130 in codes and len(lines) == 1 and "--resume" in lines[0], (codes, lines)
    assert said(launched, number + 1) == ([0, 0], [])
    assert_run_of_one(launched / plan, tmp_path)
    newest = newest_checkpoint(launched / plan)
    assert newest is not None
    with pytest.raises(ConfigError, match="written by 2 processes, each its part of DeepSpeed's state, and here are 4"):
        check_engine({"deepspeed": {}}, {}, newest, 4)
    part = next(newest.glob("global_step*/*optim_states.pt"))
    part.write_bytes(part.read_bytes()[:100])
    assert not is_whole(newest)


@needs_engine
@pytest.mark.slow
def test_what_needs_the_whole_model_is_refused_at_once(launched: Path) -> None:
    codes, lines = said(launched, 4)
    assert codes == [2, 2]
    assert len(lines) == 1 and "compare: ZeRO-3 spreads the model over the processes" in lines[0]


def test_a_plan_is_read_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match=r"training.deepspeed: .*plan.json"):
        stage_of({"deepspeed": str(tmp_path / "plan.json")})
    with pytest.raises(ConfigError, match="stage must be a number from 0 to 3, got 'three'"):
        stage_of({"deepspeed": {"zero_optimization": {"stage": "three"}}})
    assert stage_of({}) == stage_of({"deepspeed": None}) == stage_of({"deepspeed": {}}) == 0
