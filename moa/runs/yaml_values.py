"""YAML files into plain values, and plain values into frozen dataclasses, every key and type checked."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, unknown_name

NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "keys and values",
}


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
        ConfigError: it is not YAML, a key is given twice, or it is nested too deep; the place is named.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {one_line(error)}") from error
    except RecursionError:
        raise ConfigError(f"{where} is not usable YAML: it is nested too deep for any configuration.") from None
    except ConfigError:
        raise
    except ValueError as error:  # a number of thousands of digits, a date that does not exist
        raise ConfigError(f"{where} is not usable YAML: {one_line(error)}.") from error


def read_values(path: str | Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, or no keys in it.
    """
    if not is_file(path):
        raise ConfigError(f"there is no configuration {shortened(path)} (looked from {Path.cwd()}).")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 at byte {error.start}: save it in that encoding, or name a YAML file."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    values = read_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold key: value lines, got {type(values).__name__}.")
    return values


def is_file(path: str | Path) -> bool:
    """Tell whether a path is a file; one that the file system does not take is not."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Tell whether a path is a folder; one that the file system does not take is not."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def shortened(value: object, most: int = 120) -> str:
    """Return a value as text that fits into a message."""
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def one_line(error: object) -> str:
    """Return a message, which may have several lines, as one."""
    return " ".join(str(error).split())


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


def read_dataclass(cls: type, values: Any, where: str) -> Any:
    """Return the dataclass made of plain values, with every key and type checked.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing one, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where} must hold keys and values, got {shortened(repr(values))}.")
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
    made = {key: typed(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    try:
        return cls(**made)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def typed(value: Any, hint: Any, where: str) -> Any:
    """Return a plain value as its type hint wants it.

    Raises:
        ConfigError: a value of another type, or a number that is not finite.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choices = [a for a in args if a is not type(None)]
        if len(choices) == 1:
            return typed(value, choices[0], where)
        hint = choices[1] if isinstance(value, list | tuple) else choices[0]  # the one such hint: one, or several
        return typed(value, hint, where)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(typing.cast(type, hint), value, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must hold keys and values, got {shortened(repr(value))}.")
        return {str(k): typed(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(unknown_name("value", value, map(str, args), where))
        return value
    if origin in (Sequence, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} must be a list, got {shortened(repr(value))}.")
        return tuple(typed(v, args[0], where) for v in value)
    return plain(value, hint, where)


def plain(value: Any, hint: type, where: str) -> Any:
    """Return a value that must be of one plain type; a whole number is a number, too.

    Raises:
        ConfigError: it is of another type, or not finite.
    """
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if hint is str and isinstance(value, (int, float)) and where.endswith("labels"):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        shown = shortened(repr(value))
        raise ConfigError(f"{where} must be {NAMES.get(hint, hint.__name__)}, got {shown} ({type(value).__name__}).")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, got {value}.")
    return value
