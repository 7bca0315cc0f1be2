"""A checkpoint of several processes counts only if every one has written its part.

The second process is killed before its last file, when the first has written all its own: no moment is left to chance.
Run: pytest tests/parallel/test_killed.py; by real launchers: -m slow
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moa.training.checkpoints import MARKER, is_whole, newest_checkpoint, processes_of

from .processes import PATIENCE, environment
from .test_train import ACCELERATE, TORCHRUN, values_of, write
from .test_train_zero import PYTHON, needs_engine
from .test_zero import plans

KILLED_AT, STEPS = 4, 6


def commands_of(folder: Path, name: str, output: str, fault: Any = None, *words: str, **training: Any) -> str:
    """Write the commands of a group of processes, which train into a folder, and return where they are."""
    values = values_of(folder, 8, output)
    values["recipe"]["jitter"] = 0.1  # each process draws its own
    values["training"] |= {"save_steps": 2, "max_steps": STEPS, **training}
    (folder / name).mkdir()
    commands = [(["train", write(folder, f"{output}.yaml", values), *words], fault)]
    (folder / name / "commands.json").write_text(json.dumps(commands))
    return str(folder / name)


def groups(folder: Path, **training: Any) -> list[str]:
    """Return where the commands of three groups are: one that is killed, one that goes on, one that is left alone."""
    return [
        commands_of(folder, "first", "killed", (KILLED_AT, "kill"), **training),
        commands_of(folder, "second", "killed", None, "--resume", **training),
        commands_of(folder, "third", "whole", **training),
    ]


def assert_between_writes(run: Path) -> None:
    """Fail unless the newest checkpoint lacks a file of the second process, and is passed over."""
    half = run / f"checkpoint-{KILLED_AT}"
    assert (half / MARKER).is_file() and (half / "rng_state_0.pth").is_file()
    assert not (half / "rng_state_1.pth").exists() and processes_of(half) == 2
    assert newest_checkpoint(run) == run / f"checkpoint-{KILLED_AT - 2}"


def assert_same_weights(folder: Path) -> None:
    """Fail unless the run that was killed has ended, bit for bit, as the one that was not."""
    got, expected = (load_file(folder / run / "model" / "model.safetensors") for run in ("killed", "whole"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert is_whole(folder / "killed" / f"checkpoint-{KILLED_AT}")


def test_a_run_killed_between_the_writes_goes_on_from_the_checkpoint_before(tmp_path: Path) -> None:
    folders = groups(tmp_path)
    command = [sys.executable, "-m", "tests.parallel.killing", *folders]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE)
    failed = [(Path(folder) / "failed").read_text() for folder in folders]
    assert failed == ["2", "0", "0"], done.stderr[-6000:]
    assert_between_writes(Path(folders[0]) / "killed")
    assert_same_weights(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_under_each_launcher(launcher: list[str], tmp_path: Path) -> None:
    launch_all(launcher, "tests.parallel.commands", groups(tmp_path), tmp_path)


@needs_engine
@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_under_deepspeed(stage: int, tmp_path: Path) -> None:
    """Its own files of every process are there before Trainer's marker is; one that is lost is missed."""
    plan = plans(tmp_path)[stage]
    launcher = [str(PYTHON), *TORCHRUN[1:]]
    launch_all(launcher, "tests.parallel.zero_commands", groups(tmp_path, deepspeed=plan), tmp_path)
    newest = newest_checkpoint(tmp_path / "killed")
    assert newest is not None and newest.name == f"checkpoint-{STEPS}"
    part = next(newest.glob("global_step*/*pp_rank_1_*_optim_states.pt"))
    part.unlink()
    assert not is_whole(newest)


def launch_all(launcher: list[str], module: str, folders: list[str], home: Path) -> None:
    """Run three groups by a launcher, of which the first is killed."""
    for number, folder in enumerate(folders):
        command = [*launcher, "-m", module, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE)
        assert bool(done.returncode) == (number == 0), done.stderr[-3000:]
        if number == 0:
            assert_between_writes(home / "killed")
    assert_same_weights(home)
