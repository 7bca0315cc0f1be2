"""The list of wrong inputs to `moa train`, each of them a test that begins with the number of its row in the list.

A refusal is exit 2 and one line that names the key, file or row, and nothing changes; the others train one step and say
what is doubtful. `moa eval` and `moa merge`: test_wrong_inputs_list_merge.py.

Run: pytest tests/cli -k wrong_inputs_list; row 24: -m slow
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from moa.cli.main import main
from moa.errors import LostLossWarning
from moa.runs.session import Run
from tests.parallel.processes import environment
from tests.tiny_run import config_values, rows, train_with, write_jsonl

from .test_wrong_inputs import Values, sets, written
from .wrong_rows import ACCEPTED, BYTES, REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file's bytes, and None for every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(words: list[str], message: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command that must exit with 2, say one line and change nothing."""
    before = contents(home)
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err.rpartition("\r")[2].strip().splitlines()  # behind the bars of what was loaded
    assert error[-1].startswith(f"moa {words[0]}: ") and message in error[-1], error
    assert not [line for line in error[:-1] if "it/s" not in line], error
    assert contents(home) == before


def values_of(home: Path, bases: dict[str, Path], kind: str = "classification") -> Values:
    values = config_values(home, bases["encoder" if kind == "classification" else "decoder"], kind)
    values["training"] |= {"max_steps": 1, "logging_steps": 1}
    return values


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Path:
    """Return a folder with a configuration, its files and its run of two steps, a checkpoint after each."""
    home = tmp_path_factory.mktemp("trained")
    values = values_of(home, bases)
    values["training"] |= {"max_steps": 2, "save_steps": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", str(written(home, values))]) == 0
    return home


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the trained run that a test may change."""
    home = shutil.copytree(trained, tmp_path / "home")
    for file in (home / "a.yaml", home / "run" / "config.yaml"):
        file.write_text(file.read_text().replace(str(trained), str(home)))
    return home


def changed(home: Path, key: str, value: Any) -> str:
    """Change one key of a run's configuration and return its file."""
    values = yaml.safe_load((home / "a.yaml").read_text())
    sets(key, value)(home, values)
    return str(written(home, values))


@pytest.mark.parametrize("row", REFUSED)
def test_train_refuses(row: str, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    kind, change, message = REFUSED[row]
    values = values_of(tmp_path, bases, kind)
    change(tmp_path, values)
    refused(["train", str(written(tmp_path, values))], message, tmp_path, capsys)


@pytest.mark.parametrize("row", ACCEPTED)
@pytest.mark.filterwarnings("ignore:.*is not in them:UserWarning")
def test_train_accepts(row: str, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    kind, change, message = ACCEPTED[row]
    values = values_of(tmp_path, bases, kind)
    change(tmp_path, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostLossWarning)
        assert main(["train", str(written(tmp_path, values))]) == 0
    assert message in capsys.readouterr().out
    run = Path(values["output"])
    stored = yaml.safe_load((run / "config.yaml").read_text())
    tensors = load_file(run / "model" / "model.safetensors")
    assert {t.shape[1] for name, t in tensors.items() if name.endswith("bank.down")} == {stored["recipe"]["rank"]}
    assert (run / "routing.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("row", [f"{19 if 'UTF' in name else 20} {name}" for name in BYTES])
def test_train_refuses_the_file(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = BYTES[row.partition(" ")[2]]
    (tmp_path / "a.yaml").write_bytes(content)
    refused(["train", str(tmp_path / "a.yaml")], message, tmp_path, capsys)


RESUMED = {
    "21 other n_experts": ("recipe.n_experts", 6, "recipe.n_experts was 4 and is now 6"),
    "21 another router": ("recipe.router", "remix", "recipe.router was topk and is now remix"),
    "46 another data file": ("tasks.first.train", "second.train.jsonl", "tasks.first.train was "),
}


@pytest.mark.parametrize("row", RESUMED)
def test_resume_refuses(row: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, value, message = RESUMED[row]
    words = ["train", changed(run, key, str(run / value) if key.startswith("tasks") else value), "--resume"]
    refused(words, message, run, capsys)


@pytest.mark.parametrize("row", ["46 other labels of the same number"])
def test_resume_refuses_other_labels(row: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, n, seed in (("train", 32, 0), ("eval", 12, 10)):
        write_jsonl(run / f"first.{part}.jsonl", [r | {"label": r["label"].upper()} for r in rows(n, seed)])
    message = "the training labels of task 'first' are not those"
    refused(["train", str(run / "a.yaml"), "--resume"], message, run, capsys)


@pytest.mark.parametrize("row", ["22 half its weights", "22 a file that is missing"])
def test_resume_goes_on_from_the_newest_whole_checkpoint(row: str, run: Path) -> None:
    newest, model = run / "run" / "checkpoint-2", run / "run" / "model" / "model.safetensors"
    want = load_file(model)
    weights = newest / "model.safetensors"
    if "half" in row:
        weights.write_bytes(weights.read_bytes()[:-10])
    else:
        weights.unlink()
    model.unlink()
    assert main(["train", str(run / "a.yaml"), "--resume"]) == 0
    got = load_file(model)
    assert all(torch.equal(got[name], want[name]) for name in want) and weights.stat().st_size


@pytest.mark.parametrize("row", ["23 Ctrl-C"])
def test_a_stop_is_one_line(
    row: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    train_with(monkeypatch, Stop())
    config = changed(run, "output", str(run / "other"))
    capsys.readouterr()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        assert main(["train", config]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    error = capsys.readouterr().err.strip()
    assert error == "moa train: stopped; checkpoint-1 is saved: go on with moa train CONFIG --resume."


@pytest.mark.slow
@pytest.mark.parametrize("row", ["24 two processes"])
def test_two_processes_share_a_fresh_folder(row: str, tmp_path: Path, bases: dict[str, Path]) -> None:
    config = written(tmp_path, values_of(tmp_path, bases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "moa", "train", str(config)],
            env=environment(**where, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [job.communicate(timeout=300) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], said
    assert (tmp_path / "run" / "model").is_dir() and "mixture" in said[0][0] and not said[1][0]


@pytest.mark.parametrize("row", ["44 results.json", "44 routing.png", "44 routing.jsonl"])
def test_overwriting_leaves_nothing_of_the_old_run(row: str, run: Path) -> None:
    name = row.partition(" ")[2]
    (run / "run" / name).write_text("old\n")
    torch.save({}, run / "run" / "report.html")
    assert main(["train", changed(run, "overwrite", True), "--set", "training.max_steps=1"]) == 0
    assert not (run / "run" / name).read_bytes().startswith(b"old")
    assert not (run / "run" / "checkpoint-2").exists() and not (run / "run" / "report.html").exists()


@pytest.mark.parametrize("row", ["45 overwrite and a mistake"])
def test_overwriting_needs_a_run_that_can_be(row: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(run, "overwrite", True)
    refused(["train", changed(run, "recipe.n_expert", 3)], "unknown keyword 'n_expert'", run, capsys)


@pytest.mark.parametrize("row", ["54 a start that failed, again"])
def test_a_failed_start_is_started_again(
    row: str, tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(written(tmp_path, values_of(tmp_path, bases)))
    before = contents(tmp_path)

    def fails(self: Run, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such device")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "fit", fails)
        with pytest.raises(RuntimeError, match="no such device"):
            main(["train", config])
    assert contents(tmp_path) == before
    assert main(["train", config]) == 0 and os.path.isdir(tmp_path / "run" / "model")
