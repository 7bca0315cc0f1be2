"""`moa train` under torchrun: several processes are one run, which writes, speaks, stops and fails once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from moa.errors import ConfigError
from moa.runs.config import parse
from moa.runs.train import train
from tests.laws import assert_close
from tests.tiny_run import config_values, encoder_folder

from .processes import PATIENCE, environment

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
TOLERANCE = 1e-5  # of how far a weight moved: fp32, and 8 steps
STEPS = 8
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
]


def values_of(folder: Path, batch: int, output: str) -> dict[str, Any]:
    """Return the values of a configuration whose rounding is not magnified, as Adam's would be."""
    folder.mkdir(exist_ok=True)
    base = folder / "base" if (folder / "base").is_dir() else encoder_folder(folder / "base")
    values = config_values(folder, base)
    values["output"] = str(folder / output)
    values["recipe"]["jitter"] = 0.0
    values["training"] |= {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": batch}
    return values


def write(folder: Path, name: str, values: dict[str, Any]) -> str:
    """Write a configuration and return its path."""
    (folder / name).write_text(json.dumps(values))
    return str(folder / name)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Return the folder in which torchrun's two processes ran some commands, and how it ended."""
    folder = tmp_path_factory.mktemp("launched")
    values = values_of(folder, 8, "run")
    good = write(folder, "good.yaml", values)
    wrong = write(folder, "wrong.yaml", {**values, "recipe": {**values["recipe"], "router": "topkk"}})
    other = write(folder, "other.yaml", {**values, "output": str(folder / "other")})
    commands = [
        (["train", wrong], None),
        (["train", good], (6, "ctrl-c")),
        (["train", good, "--resume"], None),
        (["train", good], None),
        (["train", other], (3, "fault")),
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    command = [*TORCHRUN, "-m", "tests.parallel.commands", str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE)


def said(folder: Path, number: int) -> tuple[list[int], list[str]]:
    """Return the exit codes of a command in both processes, and the lines of moa that both wrote."""
    both = [json.loads((folder / f"said-{rank}.json").read_text())[number] for rank in range(2)]
    lines = [line for one in both for line in one["said"].splitlines() if line.startswith("moa train:")]
    return [one["code"] for one in both], lines


def test_a_wrong_configuration_is_refused_once(launched: Any) -> None:
    codes, lines = said(launched[0], 0)
    assert codes == [2, 2]
    assert len(lines) == 1 and "topkk" in lines[0]


def test_ctrl_c_stops_all_and_says_once_how_to_go_on(launched: Any) -> None:
    codes, lines = said(launched[0], 1)
    assert sorted(codes) == [2, 130]
    assert lines == ["moa train: stopped; checkpoint-4 is saved: go on with moa train CONFIG --resume."]


@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")  # routers start uneven here
def test_two_processes_end_where_one_does(launched: Any, tmp_path: Path) -> None:
    """Stopped after six steps and resumed: weights, scores and routing are those of one process without a stop."""
    folder, _ = launched
    assert said(folder, 2) == ([0, 0], [])
    assert_run_of_one(folder / "run", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_each_launcher_makes_one_run(launcher: list[str], tmp_path: Path) -> None:
    """accelerate calls several processes --multi_gpu; the configuration says use_cpu."""
    config = write(tmp_path, "two.yaml", values_of(tmp_path / "two", 8, "run"))
    command = [*launcher, "-m", "moa", "train", config]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("after training") == 1
    assert_run_of_one(tmp_path / "two" / "run", tmp_path)


@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
def test_one_process_goes_on_with_what_two_have_written(
    launched: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With as many rows a step it ends where two do, and says once what differs; other values stay refused."""
    folder, _ = launched
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / f"checkpoint-{STEPS}")
    values = values_of(folder, 16, "run") | {"output": str(tmp_path / "run")}
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.1 and is now 0\.2"):
        train(parse({**values, "training": {**values["training"], "learning_rate": 0.2}}), resume=True)
    capsys.readouterr()
    train(parse(values), resume=True)
    assert capsys.readouterr().out.count("another number of processes (2, now 1): weights, optimizer and schedule") == 1
    assert_run_of_one(tmp_path / "run", tmp_path)


def assert_run_of_one(run: Path, folder: Path) -> None:
    """Fail unless a run has the weights, the scores and the routing that one process comes to."""
    result = train(parse(values_of(folder / "one", 16, "run")))
    expected = load_file(result.folder / "model" / "model.safetensors")
    got = load_file(run / "model" / "model.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(got[name], value, TOLERANCE, name)
    found = json.loads((run / "results.json").read_text())
    steps = [row["step"] for row in map(json.loads, (run / "routing.jsonl").read_text().splitlines())]
    assert steps[-1] == STEPS
    assert_same(found["scores"], result.results["scores"])
    assert_same(found["routing"], result.results["routing"])


def assert_same(got: Any, expected: Any) -> None:
    """Fail unless nested values are alike, numbers within rounding."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(got[key], value)
    else:
        assert got == pytest.approx(expected, rel=1e-5)


def test_a_folder_with_a_run_is_refused_once(launched: Any) -> None:
    codes, lines = said(launched[0], 3)
    assert codes == [2, 2]
    assert len(lines) == 1 and "already holds a run" in lines[0]


def test_a_fault_in_one_process_ends_all(launched: Any) -> None:
    """The others do not wait for it, one line says why, and the next start finds no run in its way."""
    folder, done = launched
    lines = [line for line in done.stderr.splitlines() if line.startswith("moa train:")]
    assert done.returncode
    assert len(lines) == 1 and "not enough memory" in lines[0], done.stderr[-3000:]
    assert not (folder / "other" / "model").exists()
