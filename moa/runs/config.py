"""A training configuration: YAML or plain values in, frozen dataclasses out, every key checked."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, unknown_name
from ..experts import family_class
from ..recipes import make_recipe, recipe_class
from .tasks import Task


@dataclass(frozen=True, kw_only=True)
class Compare:
    """What the mixture is measured against, with the same rows and the same evaluation.

    Args:
        frozen: the frozen base. Classification: logistic regression per task on its pooled features. Generation: the
            base as it is.
        lora: one LoRA on the same layers with as many parameters as are active in the mixture.
        learning_rates: the LoRA's are picked from these on held-out training rows; empty takes a third of, once and
            three times the run's own.
        l2: strengths of the regression's penalty, picked in the same way.
        validation_fraction: share of the training rows held out for picking; the final training uses all rows.
        search_epochs: epochs of each LoRA run that only serves to pick; None takes the run's own number.
    """

    frozen: bool = True
    lora: bool = True
    learning_rates: Sequence[float] = ()
    l2: Sequence[float] = (0.001, 0.01, 0.1)
    validation_fraction: float = 0.2
    search_epochs: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"compare.validation_fraction must lie between 0 and 1, got {self.validation_fraction}.")
        if not self.l2:
            raise ConfigError("compare.l2 is empty: name at least one strength.")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Answers to write at the end of a generation run.

    Args:
        rows: evaluation prompts per task, at most 16.
        max_new_tokens: tokens per answer at most.
    """

    rows: int = 2
    max_new_tokens: int = 16


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that makes a run.

    Args:
        base: hub id or folder of the pretrained model.
        tasks: name -> task (see `moa.runs.tasks.Task`); their order gives the task ids. `~` and `$NAME` in paths are
            expanded.
        output: folder of the run.
        overwrite: replace a run that is already there.
        recipe: router, and that recipe's keywords; or experts, folders of PEFT LoRA adapters, in place of n_experts.
        training: keywords of `transformers.TrainingArguments`, except output_dir and seed.
        seed: of everything that is drawn.
        max_length: tokens per row at most.
        pooling: of classification: "mean", "cls" or "last".
        dtype: of the frozen base, e.g. "bfloat16"; None is as stored. Experts, routers and heads are float32.
        compare: baselines; null for none.
        generate: answers at the end of a generation run; null for none.

    Raises:
        ConfigError: a value out of range, or a recipe that does not exist.
    """

    base: str
    tasks: Mapping[str, Task]
    output: str
    overwrite: bool = False
    recipe: Mapping[str, Any] = field(default_factory=lambda: {"router": "topk"})
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_length: int = 128
    pooling: str = "mean"
    dtype: str | None = None
    compare: Compare | None = None
    generate: Generate | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2 tokens, got {self.max_length}.")
        _check_recipe(self.recipe)
        for key, instead in (("output_dir", "output"), ("seed", "seed")):
            if key in self.training:
                raise ConfigError(f"training.{key} belongs to the top level of the configuration: set {instead}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values from which `parse` makes an equal configuration."""
        return typing.cast(dict[str, Any], _plain(dataclasses.asdict(self)))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration in a YAML file.

    Args:
        path: of the file.
        overrides: "a.b=c" each, c in YAML.

    Raises:
        ConfigError: no such file, not YAML, an unknown key (the nearest known one is named), a value of another type.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"there is no configuration {path} (looked from {Path.cwd()}).")
    values = read_yaml(file.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold key: value lines, got {type(values).__name__}.")
    for override in overrides:
        set_override(values, override)
    return parse(values, str(path))


def set_override(values: dict[str, Any], override: str) -> None:
    """Set one "a.b=c" in nested values, in place.

    Raises:
        ConfigError: no "=", or a part of the key that holds a plain value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r} must look like key=value, e.g. training.learning_rate=1e-3.")
    *parents, last = key.split(".")
    inner = values
    for i, name in enumerate(parents):
        if inner.get(name) is None:
            inner[name] = {}
        inner = inner[name]
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {'.'.join(parents[: i + 1])} holds {inner!r}, which has no keys.")
    inner[last] = read_yaml(text, f"--set {override!r}")


def parse(values: Mapping[str, Any], where: str = "the configuration") -> TrainConfig:
    """Return the configuration that plain values describe, paths expanded.

    Raises:
        ConfigError: as `read_config`.
    """
    config: TrainConfig = read_dataclass(TrainConfig, values, where)
    tasks = {
        name: dataclasses.replace(task, train=_expand(task.train), eval=task.eval and _expand(task.eval))
        for name, task in config.tasks.items()
    }
    return dataclasses.replace(config, base=_expand(config.base), tasks=tasks)


# -------------------------------------------------------------------- reading


class _Loader(yaml.SafeLoader):
    """YAML as most people expect it: 1e-3 is a number, yes and no are words, a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in given]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ConfigError(f"key {twice!r} is given twice{node.start_mark}.")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rows if tag != "tag:yaml.org,2002:bool"]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, where: str) -> Any:
    """Return the value of YAML text.

    Raises:
        ConfigError: it is not YAML, or a key is given twice; the place is named.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error


def read_dataclass(cls: type, values: Any, where: str) -> Any:
    """Return the dataclass made of plain values, with every key and type checked.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must hold keys and values, got {values!r}.")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_name("key", key, hints, where))
    required = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"{where} has no {', '.join(missing)}.")
    made = {key: _value(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return a value as its type hint wants it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [a for a in args if a is not type(None)]
        if len(choices) == 1:
            return _value(value, choices[0], where)
        hint = choices[0] if isinstance(value, str) else choices[1]  # the one such hint: a name, or several
        return _value(value, hint, where)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), value, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must hold keys and values, got {value!r}.")
        return {str(k): _value(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(unknown_name("value", value, map(str, args), where))
        return value
    if origin in (Sequence, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        return tuple(_value(v, args[0], where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, (int, float)) and where.endswith("labels"):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be {hint.__name__}, got {value!r} ({type(value).__name__}).")
    return value


def _check_recipe(keywords: Mapping[str, Any]) -> None:
    """Check a recipe's name, keywords and their types, by making one."""
    options = {"router": "topk", **keywords}
    options.pop("experts", None)
    recipe = recipe_class(options["router"])
    expert = options.get("expert", next(f.default for f in dataclasses.fields(recipe) if f.name == "expert"))
    family = family_class(expert) if isinstance(expert, str) else type(expert)
    hints = typing.get_type_hints(family) | typing.get_type_hints(recipe) | {"expert": str}
    checked = {key: _value(value, hints.get(key, Any), f"recipe: {key}") for key, value in options.items()}
    make_recipe(**checked)


def _expand(source: Any) -> Any:
    """Return a path or several with ~ and $NAME expanded, absolute where they exist; hub ids stay as they are."""
    if not isinstance(source, str):
        return tuple(_expand(one) for one in source)
    text = os.path.expandvars(os.path.expanduser(source))
    return str(Path(text).resolve()) if Path(text).exists() else text


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
