"""`moa eval --calibration` against torchmetrics, on the probabilities that `moa predict` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moa.cli.main import main
from moa.monitor.calibration import calibration
from tests.tiny_run import config_values, decoder_folder, encoder_folder, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


def third_label(path: str) -> list[dict[str, Any]]:
    """Return a file's rows with every third one labelled by a word that says nothing of its text."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for row in rows[::3]:
        row["label"] = "unclear"
    return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run of a task of two classes, and one of three."""
    folder = tmp_path_factory.mktemp("calibrated")
    values = config_values(folder, encoder_folder(folder / "base"))
    for side in ("train", "eval"):
        write_jsonl(folder / f"second.{side}.jsonl", third_label(values["tasks"]["second"][side]))
    values["training"] |= {"num_train_epochs": 6, "save_strategy": "no"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(folder / "config.yaml")]) == 0
    return folder


def test_the_errors_are_those_of_torchmetrics(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    out, figure = home / "scores.json", home / "reliability.png"
    asked = ["eval", str(home / "run"), "--calibration", "--json", str(out), "--figure", str(figure)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert figure.read_bytes().startswith(b"\x89PNG")
    trained = json.loads((home / "run" / "results.json").read_text())
    assert found["scores"]["mixture"] == trained["scores"]["mixture"], "scored as without --calibration"
    for task, n_classes in (("first", 2), ("second", 3)):
        rows = home / f"{task}.eval.jsonl"
        assert (
            main(["predict", str(home / "run"), "--task", task, "--data", str(rows), "--out", f"{home}/{task}.jsonl"])
            == 0
        )
        predicted = [json.loads(line) for line in (home / f"{task}.jsonl").read_text().splitlines()]
        names = list(predicted[0]["probabilities"])
        assert len(names) == n_classes
        p = torch.tensor([[row["probabilities"][name] for name in names] for row in predicted])
        labels = torch.tensor([names.index(json.loads(line)["label"]) for line in rows.read_text().splitlines()])
        own = found["calibration"][task]
        for name, norm in (("ece", "l1"), ("mce", "max")):
            error = functional.multiclass_calibration_error(p, labels, n_classes, 10, norm).item()
            assert own[name] == pytest.approx(error, abs=1e-5) and error > 0, name
        by_hand = ((p - torch.nn.functional.one_hot(labels, n_classes)) ** 2).sum(1).mean().item()
        assert own["brier"] == pytest.approx(by_hand, abs=1e-5)
        bins = own.pop("bins")
        assert own == pytest.approx(calibration(p, labels), abs=1e-5), "the other task's classes are left out"
        assert sum(bins["counts"]) == len(labels)
        right = sum(n * a for n, a in zip(bins["counts"], bins["accuracy"], strict=True)) / len(labels)
        assert right == pytest.approx(found["scores"]["mixture"][task]["accuracy"])
        line = next(row for row in said.splitlines() if row.startswith(task) and f"{own['brier']:.3f}" in row.split())
        assert f"{own['ece']:.3f}" in line.split()


def test_what_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config_values(tmp_path, decoder_folder(tmp_path / "base"), kind="generation")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    run, there = str(home / "run"), home / "there.png"
    there.write_bytes(b"mine")
    for words, message in (
        (["--config", str(tmp_path / "config.yaml"), "--calibration"], "task 'first' is of generation"),
        (["--figure", str(tmp_path / "x.png")], "pass --calibration"),
        (["--calibration", "--figure", str(tmp_path / "x.jpg")], "--figure"),
        (["--calibration", "--figure", str(there)], "exists already"),
        (["--calibration", "--json", str(tmp_path / "x.txt")], "must end in .json"),
    ):
        assert main(["eval", run, *words]) == 2, words
        assert message in capsys.readouterr().err, words
    assert there.read_bytes() == b"mine" and not list(tmp_path.glob("x.*"))


def test_a_regression_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a task is may be known from its rows only: here from its run's heads."""
    values = config_values(tmp_path, encoder_folder(tmp_path / "base"))
    for side in ("train", "eval"):
        rows = [json.loads(line) for line in Path(values["tasks"]["second"][side]).read_text().splitlines()]
        numbers = [row | {"label": 0.25 + 0.5 * (row["label"] == "positive")} for row in rows]
        write_jsonl(tmp_path / f"second.{side}.jsonl", numbers)
    values["training"] |= {"max_steps": 1, "save_strategy": "no"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    assert main(["eval", values["output"], "--calibration"]) == 2
    assert "task 'second' is of regression" in capsys.readouterr().err
