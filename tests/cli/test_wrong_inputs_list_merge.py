"""The list of wrong inputs to `moa eval` and `moa merge`, each a test that begins with the number of its row.

Run: pytest tests/cli -k wrong_inputs_list
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moa
from moa.cli.main import main
from moa.errors import MoaWarning
from moa.merge import read_peft
from tests import models

from .test_wrong_inputs_list import changed, contents, refused
from .test_wrong_inputs_list import run as run
from .test_wrong_inputs_list import trained as trained
from .wrong_rows import BYTES

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
CONFIG = "adapter_config.json"

EVALUATED = {
    "55 other labels": (
        "tasks.first.labels=[x, y]",
        "the labels of task 'first' are negative, positive, in this order",
    ),
    "55 the labels swapped": ("tasks.first.labels=[positive, negative]", "the configuration says positive, negative"),
    "56 another pooling": ("pooling=cls", "was trained with pooling='mean'"),
    "58 a base that is not there": ("base=/nowhere/x", "base: there is no folder /nowhere/x"),
}


@pytest.mark.parametrize("row", EVALUATED)
def test_eval_refuses(row: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    override, message = EVALUATED[row]
    refused(["eval", str(trained / "run"), "--set", override], message, trained, capsys)


@pytest.mark.parametrize("row", ["57 a configuration of another recipe"])
def test_eval_says(row: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = changed(run, "recipe.n_experts", 3)
    assert main(["eval", str(run / "run"), "--config", config]) == 0
    assert "the configuration says recipe.n_experts=3, the checkpoint was made with 4" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["59 a folder that is not there"])
def test_eval_needs_a_folder(row: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["eval", str(tmp_path / "none")], f"there is no folder {tmp_path / 'none'}", tmp_path, capsys)


@pytest.fixture(scope="session")
def written_adapters(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> Path:
    """Return a folder with two LoRA adapters of one base, a and b, of rank 2."""
    home = tmp_path_factory.mktemp("adapters")
    base = AutoModelForCausalLM.from_pretrained(bases["decoder"])
    model = models.randomise(moa.build(base, "fixed", n_experts=2, rank=2, targets=["q_proj", "v_proj"]))
    for expert, name in enumerate("ab"):
        moa.export_expert(model, expert, home / name)
    return home


@pytest.fixture
def home(written_adapters: Path, tmp_path: Path) -> Path:
    """Return a copy of the adapters that a test may change."""
    return shutil.copytree(written_adapters, tmp_path / "home")


def merging(home: Path, *more: str, out: str = "out") -> list[str]:
    return ["merge", str(home / "a"), str(home / "b"), "--out", str(home / out), *more]


def configured(**values: Any) -> Callable[[Path], list[str]]:
    """Return a change of the first adapter's configuration."""

    def change(home: Path) -> list[str]:
        file = home / "a" / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
        return merging(home)

    return change


def recipe(content: bytes) -> Callable[[Path], list[str]]:
    """Return the words of a merge that a file describes."""

    def change(home: Path) -> list[str]:
        (home / "a.yaml").write_bytes(content)
        return ["merge", str(home / "a.yaml"), "--out", str(home / "out")]

    return change


def options(*more: str) -> Callable[[Path], list[str]]:
    return lambda home: merging(home, *more)


def foreign(home: Path) -> list[str]:
    (home / "project").mkdir()
    (home / "project" / "config.json").write_text("{}")
    (home / "project" / "code.py").write_text("x = 1")
    return merging(home, "--overwrite", out="project")


def entry(value: Any) -> Callable[[Path], list[str]]:
    """Return a change of one entry in the index of a checkpoint of many files."""

    def change(home: Path) -> list[str]:
        models.llama().save_pretrained(home / "base")
        models.llama().save_pretrained(home / "tuned", max_shard_size="5KB")
        index = next((home / "tuned").glob("*.index.json"))
        values = json.loads(index.read_text())
        values["weight_map"][min(values["weight_map"])] = value
        index.write_text(json.dumps(values))
        return ["merge", str(home / "tuned"), "--base", str(home / "base"), "--out", str(home / "out")]

    return change


REFUSED: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "61 method regmean": (options("--method", "regmean"), "method 'regmean' needs grams"),
    "61 method fisher": (options("--method", "fisher"), "method 'fisher' needs fishers"),
    "62 rank 0": (options("--rank", "0"), "rank must be at least 1, got 0"),
    "62 scale NaN": (options("--method", "task_arithmetic", "--set", "scale=.nan"), "scale must be a finite number"),
    "63 an input as the output": (lambda home: merging(home, "--overwrite", out="a"), "same or one holds the other"),
    "67 a foreign folder as the output": (foreign, "project is no folder with a checkpoint or adapter that moa wrote"),
    "68 an output that cannot be": (lambda home: merging(home, out="/dev/null/x"), "'/dev/null/x' cannot be written"),
    **{f"{69 if 'UTF' in name else 70} {name}": (recipe(content), said) for name, (content, said) in BYTES.items()},
    "70 a path of 300 letters": (recipe(b"adapters: [" + b"p" * 300 + b"]"), "(300 characters) is not a folder"),
    "71 a pattern that is none": (configured(alpha_pattern={"(": 1}), "the pattern '(' is no regular expression"),
    "73 rank_pattern as text": (configured(rank_pattern="("), "rank_pattern='(': expected an object"),
    "73 alpha_pattern null": (configured(alpha_pattern={".*": None}), "alpha_pattern['.*']=None: expected a finite"),
    "73 peft_type as a list": (configured(peft_type=["LORA"]), "peft_type=['LORA']: expected text"),
    "74 use_rslora as text": (configured(use_rslora="no"), "use_rslora='no': expected true or false"),
    "76 a file outside of its folder": (entry("../a/adapter_model.safetensors"), "'../a/adapter_model.safetensors'"),
    "77 an empty entry": (entry(""), "index.json"),
    "77 a number as an entry": (entry(5), "index.json"),
    "77 half a surrogate pair": (entry("\ud800.safetensors"), "index.json"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_merge_refuses(row: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = REFUSED[row]
    refused(change(home), message, home, capsys)


@pytest.mark.parametrize("row", ["60 A B", "60 A"])
def test_merge_needs_no_options(row: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in merging(home) if len(row) > 5 or word != str(home / "b")]
    before = contents(home)
    assert main([*words, "--dry-run"]) == 0 and contents(home) == before
    assert main(words) == 0
    assert "relative error of squeezing" in capsys.readouterr().out
    assert set(read_peft(home / "out")) == set(read_peft(home / "a"))


def dense(folder: Path) -> dict[str, torch.Tensor]:
    return {name: delta.dense() for name, delta in read_peft(folder).items()}


@pytest.mark.parametrize("row", ["64 scale 0", "65 rank 1000", "72 a pattern that takes for ever", "75 lora_alpha 0"])
def test_merge_says(row: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    want = {name: (dense(home / "a")[name] + dense(home / "b")[name]) / 2 for name in dense(home / "a")}
    options = ["--method", "average"]
    said = ""
    if row.startswith("64"):
        options = ["--method", "task_arithmetic", "--set", "scale=0"]
        said, want = "scale=0: the merged adapter does nothing", {name: 0 * value for name, value in want.items()}
    elif row.startswith("65"):
        options += ["--rank", "1000"]
        said = "rank 1000 is above every matrix: the largest rank there is, is 16"
    elif row.startswith("72"):
        configured(alpha_pattern={"(.*)*z": 8})(home)
    else:
        configured(lora_alpha=0)(home)
        want = {name: value / 2 for name, value in dense(home / "b").items()}
    if row.startswith("75"):
        with pytest.warns(MoaWarning, match="lora_alpha=0: what it scales counts for nothing"):
            assert main(merging(home, *options)) == 0
    else:
        assert main(merging(home, *options)) == 0
    assert said in capsys.readouterr().out
    got = dense(home / "out")
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row", ["66 experts of a classifier"])
def test_merge_takes_what_export_wrote(row: str, trained: Path, tmp_path: Path) -> None:
    assert main(["export", str(trained / "run"), str(tmp_path)]) == 0
    experts = [str(tmp_path / f"expert_{e}") for e in (0, 1)]
    assert main(["merge", *experts, "--out", str(tmp_path / "out"), "--method", "average"]) == 0
    parts = [dense(Path(expert)) for expert in experts]
    got = dense(tmp_path / "out")
    assert set(got) == set(parts[0]) and len(got) == 12
    for name, value in got.items():
        torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)
