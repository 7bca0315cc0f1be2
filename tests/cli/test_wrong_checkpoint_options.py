"""Options of commands on a checkpoint that do not fit it. Run: pytest tests/cli/test_wrong_checkpoint_options.py"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import moa
from moa.cli.main import main
from moa.runs.train import evaluate
from tests.tiny_run import config_values

from .test_wrong_inputs import written


@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
def test_evaluation_refuses_what_is_not_the_models(
    tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    values = config_values(tmp_path, bases["encoder"])
    values["training"] |= {"max_steps": 1}
    assert main(["train", str(written(tmp_path, values))]) == 0
    run = values["output"]
    other = shutil.copytree(bases["encoder"], tmp_path / "other")
    BertModel(BertConfig.from_pretrained(other)).save_pretrained(other)
    for override, message in (
        ("tasks.first.labels=[positive, negative]", "the labels of task 'first' are negative, positive, in this order"),
        ("pooling=cls", "was trained with pooling='mean'"),
        ("base=/nowhere/at/all", "there is no folder /nowhere/at/all"),
        (f"base={other}", "wrong base: "),
        (f"base={bases['decoder']}", "wrong base: "),
        ("recipe.rank=3", "--set recipe.rank: scoring a checkpoint does not look at it"),
        ("training.learning_rate=1e-3", "--set training.learning_rate: scoring a checkpoint does not look at it"),
        ("output=elsewhere", "--set output: scoring"),
    ):
        assert main(["eval", run, "--set", override]) == 2, override
        assert message in capsys.readouterr().err.splitlines()[-1]
    values["recipe"]["rank"] = 3
    assert main(["eval", run, "--config", str(written(tmp_path, values))]) == 0
    assert "the configuration says recipe.rank=3, the checkpoint was made with 2" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
def test_evaluation_takes_another_place_and_dtype_of_the_base(tmp_path: Path, bases: dict[str, Path]) -> None:
    """The base may have moved; its dtype changes the loss as it does in Python."""
    values = config_values(tmp_path, bases["encoder"])
    values["training"] |= {"max_steps": 1}
    assert main(["train", str(written(tmp_path, values))]) == 0
    moved = shutil.copytree(bases["encoder"], tmp_path / "moved")
    scores = [evaluate(values["output"], None, over)["scores"]["mixture"]["first"] for over in ([], [f"base={moved}"])]
    assert scores[0] == scores[1]
    coarse = evaluate(values["output"], None, ["dtype=bfloat16"])["scores"]["mixture"]["first"]
    assert 1e-6 < abs(coarse["loss"] - scores[0]["loss"]) < 0.05


@pytest.mark.parametrize("command", ["fold", "distill"])
def test_task_ids_that_nothing_has(
    command: str, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for router, options in (("moelora", {"n_tasks": 2}), ("topk", {})):
        base = AutoModelForCausalLM.from_pretrained(bases["decoder"])
        moa.build(base, router, n_experts=2, rank=2, **options).save_pretrained(tmp_path / router)
    more = ["--rank", "2"] if command == "distill" else []
    capsys.readouterr()
    for router, task, message in (
        ("moelora", "9", "--task must be from 0 to 1, got 9"),
        ("moelora", "-1", "--task must be from 0 to 1, got -1"),
        ("topk", "0", "nothing in this checkpoint looks at a task"),
    ):
        assert main([command, str(tmp_path / router), str(tmp_path / "out"), "--task", task, *more]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]  # after the bars of loading
        assert error.startswith(f"moa {command}: ") and message in error
    assert main([command, str(tmp_path / "moelora"), str(tmp_path / "out"), "--task", "1", *more]) == 0
    assert main(["inspect", str(tmp_path / "topk"), "--tokens", "0"]) == 2
    assert "--tokens must be at least 1, got 0" in capsys.readouterr().err
