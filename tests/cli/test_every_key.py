"""Every key with every kind of wrong value: a sensible run or one line, never a traceback.

Run: pytest tests/cli/test_every_key.py
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa.cli.main import main
from moa.errors import ConfigError, MoaWarning
from moa.recipes import RECIPES, make_recipe
from moa.runs.arguments import check_training, known_arguments
from moa.runs.config import Compare, Generate, TrainConfig, parse
from moa.runs.tasks import Task
from tests.tiny_run import assert_refused, config_values, decoder_folder, write_jsonl

HUGE = 10**30
NUMBERS = [-1, 0, 1, -0.5, 0.5, HUGE, float("nan"), float("inf")]
WRONG = [*NUMBERS, "text", "no", "", None, True, False, [], {}, ["a"], [1], {"a": 1}, "a\0b", "\x1b[31m$a_$\u202e<b>"]
SECTIONS = {"compare": Compare, "generate": Generate, "tasks.mine": Task, "": TrainConfig}


def refused_or_taken(make: Any, *args: Any, **options: Any) -> bool:
    """Return whether something is taken; what is refused is refused by a ConfigError, in one line that prints."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MoaWarning)
            make(*args, **options)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)
        return False
    return True


@pytest.mark.parametrize("section", SECTIONS)
def test_keys_of_a_configuration(section: str) -> None:
    taken = 0
    for field in dataclasses.fields(SECTIONS[section]):
        for value in WRONG:
            values: dict[str, Any] = {"base": "b", "output": "o", "tasks": {"mine": {"train": "rows.jsonl"}}}
            inner = values
            for part in section.split(".") if section else ():
                inner = inner.setdefault(part, {})
            inner[{"imports": "import"}.get(field.name, field.name)] = value
            taken += refused_or_taken(parse, values, recipe=False)
    assert 0 < taken < len(WRONG) * len(dataclasses.fields(SECTIONS[section])) // 2


def test_arguments_of_training() -> None:
    known = known_arguments()
    assert len(known) > 80
    for name in known:
        for value in WRONG:
            taken = refused_or_taken(check_training, {name: value})
            assert not (taken and value == HUGE), name
            assert not (taken and isinstance(value, float) and value != value), name


@pytest.mark.parametrize("name", RECIPES)
def test_keywords_of_a_recipe(name: str) -> None:
    for field in dataclasses.fields(RECIPES[name]):
        for value in WRONG:
            taken = refused_or_taken(make_recipe, name, **{field.name: value})
            assert not (taken and isinstance(value, int) and value == HUGE), field.name
            near = f"{field.name}x"
            with pytest.raises(ConfigError, match=field.name):
                make_recipe(name, **{near: value})


LATE: dict[str, tuple[dict[str, Any], str]] = {
    "a beta": ({"adam_beta1": 1}, "adam_beta1 must be at least 0 and below 1, got 1"),
    "a schedule's keyword": ({"lr_scheduler_kwargs": {"a": 1}}, "unexpected keyword argument 'a'"),
    "a schedule's keywords in words": ({"lr_scheduler_kwargs": "text"}, "must be keys and values, got 'text'"),
    "an optimizer's keyword": ({"optim_args": "text"}, "no optimizer and schedule can be made"),
    "names that are numbers": ({"optim_target_modules": [1]}, "must be text or a list of names"),
    "a whole number beyond all": ({"max_steps": HUGE}, "max_steps must be below 2**63"),
    "wandb": ({"report_to": "wandb"}, "pip install wandb"),
    "deepspeed": ({"deepspeed": "ds.json"}, "ds.json"),
    "logging_dir": ({"logging_dir": "logs"}, "TENSORBOARD_LOGGING_DIR"),
    "evaluation_strategy": ({"evaluation_strategy": "steps"}, "It is now eval_strategy"),
    "group_by_length": ({"group_by_length": True}, "It is now train_sampling_strategy"),
}
TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "a column of another kind": ({"label": "x"}, "label is read by kind classification"),
    "a split of a file": ({"split": "validation"}, "split is of hub data sets"),
    "an evaluation split of a file": ({"eval_split": "test", "eval": None}, "eval_split is of hub data sets"),
    "a subset of a file": ({"subset": "mnli"}, "subset is of hub data sets"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder_folder(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", [*LATE, *TASKS])
def test_one_line_and_nothing_written(
    name: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config_values(tmp_path, base, "generation")
    changes, message = (LATE | TASKS)[name]
    (values["training"] if name in LATE else values["tasks"]["first"]).update(changes)
    config = tmp_path / "a.yaml"
    config.write_text(yaml.safe_dump(values))
    assert_refused(config, message, capsys)


def test_thousands_of_labels_are_counted(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config_values(tmp_path, base)
    parts = {
        part: [{"text": "it", "label": f"l{i}"} for i in range(n)] for part, n in (("train", 3000), ("eval", 4000))
    }
    files = {part: str(write_jsonl(tmp_path / f"{part}.jsonl", rows)) for part, rows in parts.items()}
    values["tasks"] = {"a\x1b[31m\n$b$": files}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    error = capsys.readouterr().err
    assert "and 992 more, which training has not seen" in error and len(error) < 600
    assert "\x1b" not in error and len(error.splitlines()) == 1


def test_empty_answers_are_said(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config_values(tmp_path, base, "generation")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "it", "answer": ""}] * 8)
    values["tasks"] = {"mine\x1b[31m": {"kind": "generation", "train": str(rows)}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "a.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 training answers are empty: they teach the end token only" in said
    assert "mine\\x1b[31m" in said and "\x1b" not in said
