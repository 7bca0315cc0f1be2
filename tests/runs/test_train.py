"""Runs from a configuration: files, learning, resume, baselines, answers. Run: pytest tests/runs/test_train.py"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

import moa
from moa.errors import ConfigError
from moa.monitor.statistics import RoutingCollapseWarning
from moa.runs.config import parse
from moa.runs.encode import encode_tasks
from moa.runs.run_model import load_tokenizer
from moa.runs.session import Run
from moa.runs.summary import RunResult, score_table, summary
from moa.runs.train import evaluate, train
from tests.tiny_run import config_values, decoder_folder, encoder_folder

# some of these tiny routers do collapse: that is said rightly, and not what is tested here
pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"encoder": encoder_folder(folder / "encoder"), "decoder": decoder_folder(folder / "decoder")}


def values(tmp_path: Path, bases: dict[str, Path], kind: str = "classification", **changes: Any) -> dict[str, Any]:
    base = bases["encoder" if kind == "classification" else "decoder"]
    made = config_values(tmp_path, base, kind)
    training = {**made["training"], **changes.pop("training", {})}
    return {**made, "training": training, **changes}


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path]) -> RunResult:
    folder = tmp_path_factory.mktemp("classified")
    recipe = {"router": "remix", "n_experts": 4, "k": 2, "rank": 2, "targets": "all-linear"}
    compare = {"learning_rates": [3e-3, 1e-2], "search_epochs": 1}
    made = values(folder, bases, recipe=recipe, compare=compare, training={"num_train_epochs": 8})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", RoutingCollapseWarning)
        return train(parse(made))


def test_a_run_leaves_what_it_says(classified: RunResult) -> None:
    names = {path.name for path in classified.folder.iterdir()}
    assert {"config.yaml", "results.json", "routing.png", "routing.jsonl", "model", "runs"} <= names
    assert (classified.folder / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((classified.folder / "results.json").read_text()) == classified.results
    inside = {path.name for path in (classified.folder / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= inside


def test_tensorboard_events_hold_loss_and_routing(classified: RunResult) -> None:
    tags = set()
    for file in (classified.folder / "runs").rglob("events*"):
        events = EventAccumulator(str(file.parent))
        events.Reload()
        tags |= set(events.Tags()["scalars"]) | set(events.Tags()["images"])
    assert {"train/loss", "moa/mean/effective_experts", "moa_load/all"} <= tags


def test_scores_are_of_every_model_and_the_mixture_learned(classified: RunResult) -> None:
    scores = classified.results["scores"]
    assert list(scores) == ["before", "mixture", "frozen base", "LoRA"]
    for rows in scores.values():
        assert list(rows) == ["first", "second"]
        assert all(0 <= row["accuracy"] <= 1 and row["loss"] > 0 for row in rows.values())
    before, after = (sum(row["loss"] for row in scores[name].values()) for name in ("before", "mixture"))
    assert after < 0.8 * before


def test_baselines_say_what_they_are(classified: RunResult) -> None:
    about = classified.results["compare"]
    active = classified.results["parameters"]["active"]
    assert about["LoRA"]["parameters"] == active  # k · rank = 4 is a whole rank here
    assert [row["value"] for row in about["LoRA"]["tried"]] == [3e-3, 1e-2]
    assert about["LoRA"]["learning_rate"] in (3e-3, 1e-2)
    assert [row["value"] for row in about["frozen base"]["tried"]] == [0.001, 0.01, 0.1]


def test_the_loaded_checkpoint_scores_the_same(classified: RunResult) -> None:
    again = evaluate(classified.folder)
    assert again["scores"]["mixture"] == classified.results["scores"]["mixture"]
    assert again["tasks"] == classified.results["tasks"]
    assert evaluate(classified.folder / "model")["scores"] == again["scores"]


def test_evaluating_other_tasks_is_refused(classified: RunResult, tmp_path: Path, bases: dict[str, Path]) -> None:
    import yaml

    made = values(tmp_path, bases)
    del made["tasks"]["second"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(made))
    with pytest.raises(ConfigError, match=r"has heads for first, second; the tasks are first"):
        evaluate(classified.folder, tmp_path / "other.yaml")


def test_the_text_shows_every_number_and_the_next_commands(classified: RunResult) -> None:
    text = summary(classified)
    table = score_table(classified.results)
    assert table in text
    for task in ("first", "second"):
        row = next(line for line in table.splitlines() if line.startswith(task))
        for name in ("before", "frozen base", "LoRA", "mixture"):
            assert f"{classified.results['scores'][name][task]['accuracy']:.3f}" in row
    for command in ("moa report", "moa inspect", "tensorboard --logdir"):
        assert f"{command} {classified.folder}" in text
    assert "from 0.003 (" in text


def test_routing_is_counted_on_evaluation_rows(classified: RunResult) -> None:
    routing = classified.results["routing"]
    assert len(routing) == 12  # q, k, v, o, up, down of two layers
    for row in routing.values():
        assert sum(row["load"]) == pytest.approx(1, abs=1e-12)


class StopAt(TrainerCallback):
    """Ends training after a step, as a kill would, with the schedule of the whole run."""

    def __init__(self, step: int) -> None:
        self.at = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("router", ["remix", "sigmoid"])
def test_resume_is_bit_exact(
    tmp_path: Path, bases: dict[str, Path], router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"router": router, "n_experts": 4, "k": 2, "rank": 2}
    made = values(tmp_path, bases, recipe=recipe)
    whole = train(parse({**made, "output": str(tmp_path / "whole")}))
    cut = parse({**made, "output": str(tmp_path / "cut")})

    plain = Run.trainer

    def stopping(self: Run, *args: Any, **kwargs: Any) -> Any:
        trainer = plain(self, *args, **kwargs)
        trainer.add_callback(StopAt(6))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(Run, "trainer", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert (tmp_path / "cut" / "checkpoint-4").is_dir()
    resumed = train(cut, resume=True)
    first, second = (load_file(r.folder / "model" / "model.safetensors") for r in (whole, resumed))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert whole.results["scores"] == resumed.results["scores"]
    steps = [json.loads(line)["step"] for line in (resumed.folder / "routing.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_generation_learns_and_answers(tmp_path: Path, bases: dict[str, Path]) -> None:
    made = values(
        tmp_path,
        bases,
        "generation",
        generate={"rows": 2, "max_new_tokens": 3},
        compare={"learning_rates": [1e-2]},
        training={"num_train_epochs": 12, "learning_rate": 3e-2},
    )
    result = train(parse(made))
    scores = result.results["scores"]
    assert scores["frozen base"] == scores["before"]  # experts start at zero
    assert sum(r["loss"] for r in scores["mixture"].values()) < 0.5 * sum(r["loss"] for r in scores["before"].values())
    answers = result.results["answers"]
    assert [row["task"] for row in answers] == ["first", "first", "second", "second"]
    assert all(row["prompt"].startswith("review ") and row["prompt"].endswith(" label:") for row in answers)
    assert result.results["tasks"]["first"]["majority"] is None
    assert "written" in summary(result)


def test_accuracy_of_answers_is_greedy_exact_match(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Teacher-forced accuracy equals what `generate` writes, over all evaluation rows."""
    made = values(tmp_path, bases, "generation", training={"num_train_epochs": 3, "learning_rate": 3e-2})
    config = parse(made)
    result = train(config)
    from moa.runs.train import answers

    tokenizer = load_tokenizer(config.base)
    tasks = encode_tasks(config.tasks, tokenizer, config.max_length, config.seed)
    model = moa.load(result.folder / "model")
    written = answers(model, tokenizer, tasks, rows=16, max_new_tokens=4)
    for task in tasks:
        own = [row for row in written if row["task"] == task.name]
        assert len(own) == 12
        share = sum(row["generated"] == row["answer"] for row in own) / 12
        assert share == pytest.approx(result.results["scores"]["mixture"][task.name]["accuracy"])


def test_scoring_before_is_left_out_where_asked(
    tmp_path: Path, bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    training = {"max_steps": 1, "disable_tqdm": False}
    made = values(tmp_path, bases, score_before=False, training=training, compare={"lora": False})
    result = train(parse(made))
    assert set(result.results["scores"]) == {"mixture", "frozen base"}
    said = capfd.readouterr()
    assert "before training" not in said.out and "before" not in score_table(result.results)
    assert "after training: " in said.err and "training: 100%" in said.err and "before training" not in said.err
    quiet = {**made, "score_before": True, "output": str(tmp_path / "quiet")}
    train(parse({**quiet, "training": {**made["training"], "disable_tqdm": True}, "compare": None}))
    said = capfd.readouterr()
    assert "before training" in said.out and "before training" not in said.err and "training: " not in said.err


# -------------------------------------------------------------------- bad inputs


def test_unknown_training_argument(tmp_path: Path, bases: dict[str, Path]) -> None:
    made = values(tmp_path, bases, training={"learning_rat": 1})
    with pytest.raises(ConfigError, match=r"unknown training argument 'learning_rat'.*Did you mean 'learning_rate'"):
        train(parse(made))


def test_a_value_that_training_arguments_refuse(tmp_path: Path, bases: dict[str, Path]) -> None:
    made = values(tmp_path, bases, training={"eval_strategy": "sometimes"})
    with pytest.raises(ConfigError, match=r"training: .*sometimes"):
        train(parse(made))


def test_a_run_is_not_overwritten_unasked(tmp_path: Path, bases: dict[str, Path]) -> None:
    made = values(tmp_path, bases, training={"max_steps": 1})
    train(parse(made))
    with pytest.raises(ConfigError, match=r"already holds a run.*overwrite=true"):
        train(parse(made))
    train(parse({**made, "overwrite": True}))


def test_nothing_to_resume(tmp_path: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(parse(values(tmp_path, bases)), resume=True)


def test_bases_that_cannot_be_read(tmp_path: Path, bases: dict[str, Path]) -> None:
    made = values(tmp_path, bases)
    with pytest.raises(ConfigError, match=r"base: there is no folder .*gone"):
        train(parse({**made, "base": str(tmp_path / "gone")}))
    only_tokenizer = tmp_path / "half"
    load_tokenizer(str(bases["encoder"])).save_pretrained(only_tokenizer)
    with pytest.raises(ConfigError, match=r"base: .*half.* cannot be loaded"):
        train(parse({**made, "base": str(only_tokenizer), "overwrite": True}))


def test_output_that_is_a_file(tmp_path: Path, bases: dict[str, Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file, name a folder"):
        train(parse(values(tmp_path, bases, output=str(tmp_path / "file"))))
