"""Training configurations: types, unknown keys, overrides, YAML traps. Run: pytest tests/runs/test_config.py"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa.errors import ConfigError
from moa.runs.config import Compare, Generate, TrainConfig, parse, read_config
from moa.runs.tasks import Task
from moa.runs.yaml_values import read_yaml, set_override

VALUES: dict[str, Any] = {
    "base": "some/model",
    "output": "runs/x",
    "tasks": {"a": {"train": "a.jsonl"}},
    "recipe": {"router": "remix", "n_experts": 4},
}


def changed(**changes: Any) -> dict[str, Any]:
    return {**VALUES, **changes}


def test_values_become_dataclasses() -> None:
    config = parse(changed(compare={"lora": False}, generate={}, seed=3))
    assert config.tasks["a"] == Task(train="a.jsonl")
    assert config.compare == Compare(lora=False)
    assert config.generate == Generate()
    assert (config.seed, config.recipe["n_experts"]) == (3, 4)


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = parse(changed(compare={"learning_rates": [1e-3, 2]}, tasks={"a": {"train": ["x.csv"], "labels": [0, 1]}}))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert read_config(path) == config
    assert config.tasks["a"].labels == ("0", "1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (changed(recipes={}), r"unknown key 'recipes' in the configuration. Did you mean 'recipe'"),
        (
            changed(tasks={"a": {"trian": "x"}}),
            r"unknown key 'trian' in the configuration: tasks.a. Did you mean 'train'",
        ),
        (changed(compare={"lor": True}), r"unknown key 'lor' .*compare. Did you mean 'lora'"),
        (changed(generate={"row": 1}), r"unknown key 'row' .*Did you mean 'rows'"),
        (changed(recipe={"router": "remix", "n_expert": 4}), r"unknown keyword 'n_expert'.*Did you mean 'n_experts'"),
        (changed(recipe={"router": "remiks"}), r"unknown router 'remiks'.*Did you mean 'remix'"),
        (changed(recipe={"n_experts": 2, "k": 3}), r"k must be at most n_experts"),
        (changed(recipe={"router": "remix", "samples": 1}), r"samples must be at least 2"),
        (changed(recipe={"n_experts": "four"}), r"recipe: n_experts must be a whole number, got 'four' \(str\)"),
        (changed(recipe={"router": "remix", "granularity": "tokens"}), r"unknown value 'tokens'.*Did you mean 'token'"),
        (changed(seed="one"), r"seed must be a whole number, got 'one'"),
        (changed(seed=True), r"seed must be a whole number, got True"),
        (changed(overwrite=1), r"overwrite must be true or false"),
        (changed(tasks=["a"]), r"tasks must hold keys and values"),
        (changed(compare={"learning_rates": 0.1}), r"learning_rates must be a list"),
        (changed(compare={"validation_fraction": 2.0}), r"validation_fraction must lie"),
        (changed(compare={"l2": []}), r"l2 is empty"),
        (changed(max_length=1), r"max_length must be at least 2"),
        (changed(training={"output_dir": "x"}), r"training.output_dir belongs to the top level.*set output"),
        (changed(training={"seed": 1}), r"training.seed belongs"),
        ({"base": "x"}, r"has no tasks, output"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(values)


def test_overrides_are_typed_by_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    sets = ["training.learning_rate=1e-3", "seed=7", "recipe.targets=[query, value]", "compare.frozen=false", "base=b"]
    config = read_config(path, sets)
    assert config.training == {"learning_rate": 0.001}
    assert (config.seed, config.base) == (7, "b")
    assert config.recipe["targets"] == ("query", "value") or config.recipe["targets"] == ["query", "value"]
    assert config.compare == dataclasses.replace(Compare(), frozen=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"must look like key=value"),
        ("=3", r"must look like key=value"),
        ("base.name=x", r"base holds 'some/model', which has no keys"),
        ("seed=[1", r"is not YAML"),
        ("sed=1", r"unknown key 'sed'.*Did you mean 'seed'"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    with pytest.raises(ConfigError, match=message):
        read_config(path, [override])


def test_overrides_make_missing_levels() -> None:
    values: dict[str, Any] = {"compare": None}
    set_override(values, "compare.lora=true")
    set_override(values, "a.b.c=1")
    assert values == {"compare": {"lora": True}, "a": {"b": {"c": 1}}}


def test_yaml_traps() -> None:
    assert read_yaml("[1e-3, 2E5, .5e-1, -1e+2]", "x") == [0.001, 2e5, 0.05, -100.0]
    assert read_yaml("[yes, no, on, true, False]", "x") == ["yes", "no", "on", True, False]
    assert read_yaml("a: &x {p: 1, q: 2}\nb:\n  <<: *x\n  q: 3", "x") == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}}
    with pytest.raises(ConfigError, match="'a' is given twice"):
        read_yaml("a: 1\nb: 2\na: 3", "x")


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no configuration"):
        read_config(tmp_path / "nothing.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold key: value lines, got list"):
        read_config(path)


def test_paths_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("")
    config = parse(changed(base="$MY_DATA", tasks={"a": {"train": "$MY_DATA/a.jsonl", "eval": ["$MY_DATA/b.csv"]}}))
    assert config.base == str(tmp_path.resolve())
    assert config.tasks["a"].train == str((tmp_path / "a.jsonl").resolve())
    assert config.tasks["a"].eval == (f"{tmp_path}/b.csv",)


def test_every_key_is_documented() -> None:
    for cls in (TrainConfig, Task, Compare, Generate):
        text = cls.__doc__ or ""
        for item in dataclasses.fields(cls):
            assert f"        {item.name}: " in text, (cls.__name__, item.name)
