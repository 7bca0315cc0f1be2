"""Numbers as labels: reading, training, scoring, predicting. Run: pytest tests/runs/test_regression.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moa
from moa.cli.main import main
from moa.errors import ConfigError
from moa.model.build import load
from moa.runs.encode import IGNORED, encode_tasks
from moa.runs.metrics import Numbers
from moa.runs.task_rows import TaskRows, read_tasks
from moa.runs.tasks import Task
from tests.tiny_run import config_values, encoder_folder, rows, tokenizer, write_jsonl

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


def read(folder: Path, values: list[Any], eval_values: list[Any] | None = None, **task: Any) -> TaskRows:
    train = write_jsonl(folder / "train.jsonl", [{"text": "it was", "label": label} for label in values])
    other = write_jsonl(folder / "eval.jsonl", [{"text": "it was", "label": v} for v in eval_values or values])
    return read_tasks({"mine": Task(train=str(train), eval=str(other), **task)})[0]


@pytest.mark.parametrize(
    ("labels", "options", "regresses"),
    [
        ([0.5, 1, 2.0], {}, True),
        (["0.5", "1", "-2e-1"], {}, True),
        ([1.0, 2.0, 3], {}, False),
        (["1", "2"], {}, False),
        ([True, False], {}, False),
        ([1, 2, 3], {"problem": "regression"}, True),
        ([0.5, 1.5], {"problem": "classification"}, False),
        ([0.5, 1.5], {"labels": ["0.5", "1.5"]}, False),
    ],
)
def test_fractions_are_a_regression(tmp_path: Path, labels: list[Any], options: Any, regresses: bool) -> None:
    made = read(tmp_path, labels, **options)
    assert made.regresses is regresses and made.kind == ("regression" if regresses else "classification")
    assert made.labels == (
        ["label"] if regresses else [f"{v:g}" if not isinstance(v, (str, bool)) else str(v) for v in sorted(labels)]
    )
    if regresses:
        assert made.targets(made.train) == [[float(label)] for label in labels]


def test_a_fraction_in_either_file_says_so(tmp_path: Path) -> None:
    assert read(tmp_path, [1, 2, 3], [1, 2.5]).regresses


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0.5, "good", 1, "bad"], {}, r"fractions \(0.5 in row 1 of train.jsonl and 1 more rows\) and what is not a "),
        ([0.5, True], {}, r"what is not a number \(True in row 2 of train.jsonl"),
        ([1, "n/a"], {"problem": "regression"}, r"row 2 of train.jsonl has 'n/a' in column 'label', and a regression"),
        ([1, "inf"], {"problem": "regression"}, r"needs a finite number"),
    ],
)
def test_what_is_not_a_number_is_named_by_row(tmp_path: Path, labels: list[Any], options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, labels, **options)


def test_large_numbers_are_said(tmp_path: Path) -> None:
    assert "reach from 1000.5 to 3000" in read(tmp_path, [1000.5, 2000, 3000]).notes[0]
    assert read(tmp_path, [0.5, 2, 3]).notes == []


def test_classes_beside_numbers_are_numbers(tmp_path: Path) -> None:
    values = [{"text": "it was", "label": "ab"[i % 2], "x": i / 4, "y": -100} for i in range(4)]
    file = str(write_jsonl(tmp_path / "both.jsonl", values))
    tasks = {
        "classes": Task(train=file, eval=file),
        "numbers": Task(train=file, eval=file, label=["x", "y"]),
    }
    classes, numbers = encode_tasks(tasks, tokenizer(), 8)
    assert list(classes.train["labels"]) == [[0.0], [1.0], [0.0], [1.0]]
    assert list(numbers.train["labels"])[1] == [0.25, pytest.approx(-100, abs=1e-4)]
    assert torch.tensor(numbers.train["labels"][1])[1] != IGNORED  # a number of -100 is one that is learned


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trained run of two regressions, one of two columns, beside a classification."""
    home = tmp_path_factory.mktemp("numbers")
    values = config_values(home, encoder_folder(home / "base"))
    for part, seed in (("train", 3), ("eval", 5)):
        made = [
            {
                "text": row["text"],
                "size": 1.25 if row["label"] == "positive" else -0.75,
                "film": int("film" in row["text"]),
            }
            for row in rows(48 if part == "train" else 20, seed)
        ]
        write_jsonl(home / f"numbers.{part}.jsonl", made)
    files = {part: str(home / f"numbers.{part}.jsonl") for part in ("train", "eval")}
    values["tasks"]["second"] = {**files, "label": "size"}
    values["tasks"]["third"] = {**files, "label": ["size", "film"]}
    values["compare"] = {"lora": False}
    values["recipe"]["targets"] = "ffn"
    values["training"] |= {"num_train_epochs": 3, "learning_rate": 3e-2, "eval_strategy": "epoch"}
    (home / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(home / "config.yaml")]) == 0
    return home / "run"


def test_a_mixed_run_learns_and_scores(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    scores = results["scores"]
    assert set(scores) == {"before", "mixture", "frozen base"}
    assert scores["mixture"]["second"]["rmse"] < 0.9 * results["tasks"]["second"]["constant"]["rmse"]
    assert {"rmse.size", "rmse.film", "pearson", "spearman_error"} <= set(scores["mixture"]["third"])
    assert "accuracy" in scores["mixture"]["first"] and "rmse" not in scores["mixture"]["first"]
    assert results["tasks"]["second"]["kind"] == "regression" and results["tasks"]["second"]["majority"] is None
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert sum("eval_loss" in row for row in log) == 3 and not any("eval_accuracy" in row for row in log)


def test_scores_and_predictions_are_the_models(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((run / "results.json").read_text())
    assert main(["eval", str(run)]) == 0
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("third"))
    assert f"{results['scores']['mixture']['third']['rmse']:.3f} ±" in line
    data = run.parent / "numbers.eval.jsonl"
    model = load(run / "model").eval()
    lines = [json.loads(text) for text in data.read_text().splitlines()]
    want = []
    for row in lines:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokenizer()(row["text"])["input_ids"]]), task_ids=torch.tensor([2]))
        want.append(out.logits[0, :2].tolist())
    base = ["predict", str(run), "--data", str(data), "--out"]
    assert main([*base, str(tmp_path / "third.jsonl"), "--task", "third"]) == 0
    got = [json.loads(text) for text in (tmp_path / "third.jsonl").read_text().splitlines()]
    assert [list(row["values"]) for row in got] == [["size", "film"]] * 20
    assert [list(row["values"].values()) for row in got] == [pytest.approx(row, abs=1e-5) for row in want]
    truth = torch.tensor([[row["size"], row["film"]] for row in lines])
    scores = Numbers(["size", "film"]).scores([torch.tensor(want).numpy()], truth.numpy())
    assert results["scores"]["mixture"]["third"] == pytest.approx(scores, abs=1e-5)
    assert main([*base, str(tmp_path / "second.csv"), "--task", "second"]) == 0
    assert (tmp_path / "second.csv").read_text().startswith("row,value\n1,")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tasks.second.problem=classification",
            "the head of task 'second' gives numbers, the configuration says class",
        ),
        ("tasks.second.label=film", "the head of task 'second' gives size, the configuration's label is film"),
        ("tasks.first.problem=regression", "the head of task 'first' gives classes, the configuration says regression"),
    ],
)
def test_other_labels_than_the_heads_give_are_named(
    run: Path, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run), "--set", override]) == 2
    assert message in capsys.readouterr().err


def test_what_needs_classes_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(run.parent / "config.yaml")
    output = ["--set", f"output={run.parent / 'other'}"]
    assert main(["train", config, *output, "--set", "training.label_smoothing_factor=0.1"]) == 2
    assert "label_smoothing_factor is for classes, and task 'second' is a regression" in capsys.readouterr().err
    assert main(["train", config, *output, "--set", "training.metric_for_best_model=accuracy"]) == 2
    assert "unknown measure 'accuracy'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"this model gives numbers.*objective='mse'"):
        moa.distill(load(run / "model"), rank=2)


def test_the_smallest_error_is_the_best(tmp_path: Path) -> None:
    from moa.runs.config import parse
    from moa.runs.session import training_arguments

    values = {"base": "x", "output": str(tmp_path / "run"), "tasks": {"a": {"train": "a.csv"}}}
    for measure, greater in (("eval_rmse", False), ("mae", False), ("pearson", True)):
        training = {"metric_for_best_model": measure, "report_to": "none"}
        assert training_arguments(parse({**values, "training": training})).greater_is_better is greater
