"""Tables of rows by name, which other packages can add to: recipes, adapter families; and their keywords."""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .errors import ConfigError, shown, unknown_name

PLAIN = (type(None), bool, int, float, str, list, tuple, dict)  # what a file can hold
LARGEST = 2**63 - 1  # of a whole number that torch takes
Row = TypeVar("Row", bound=type)
# peft's spelling of a keyword, and that of other mixtures -> ours
PEFT_WORDS = {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_experts": "n_experts",
    "top_k": "k",
}


def put(table: dict[str, Row], name: str, row: Row, kind: str) -> None:
    """Put a row into a table under a name; no tensors, so no shapes.

    Raises:
        ConfigError: the name is taken by another class.
    """
    taken = table.get(name)
    if taken is not None and taken.__qualname__ != row.__qualname__:
        raise ConfigError(f"{kind} {name!r} is already {taken.__module__}.{taken.__qualname__}: choose another name.")
    table[name] = row


def find(
    table: dict[str, Row], name: str, kind: str, group: str, register: Callable[[str], Callable[[Row], Row]]
) -> Row:
    """Return the row of a name, from the table or from a plug-in; no tensors, so no shapes.

    Args:
        table: name -> row.
        name: what is looked for.
        kind: what the name should be, in the error.
        group: of the entry points that name plug-ins; one is loaded when it is first asked for.
        register: the decorator that puts a row into the table.

    Raises:
        ConfigError: neither has it; the nearest known name is given.
    """
    plugins = {entry.name: entry for entry in entry_points(group=group)} if name not in table else {}
    if name in plugins:
        register(name)(plugins[name].load())
    if name not in table:
        raise ConfigError(unknown_name(kind, name, [*table, *plugins]))
    return table[name]


def own_words(options: Mapping[Any, Any], where: str = "") -> dict[str, Any]:
    """Return keywords with peft's spellings replaced by ours; no tensors, so no shapes.

    Args:
        options: keyword -> value.
        where: what begins the error, e.g. "recipe: ".

    Raises:
        ConfigError: one is given under both spellings.
    """
    out: dict[str, Any] = {}
    for key, value in options.items():
        ours = PEFT_WORDS.get(key, str(key))
        if ours in out or (ours != key and ours in options):
            raise ConfigError(f"{where}{ours} is given twice, once under peft's spelling: give it once.")
        out[ours] = value
    return out


def check_numbers(row: Any, not_negative: Iterable[str] = ()) -> None:
    """Check the numbers among a row's keywords; no tensors, so no shapes.

    Args:
        row: a dataclass.
        not_negative: keywords that must be at least 0.

    Raises:
        ConfigError: one is NaN or infinite, too large for any number type, or is negative and must not be.
    """
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{field.name} must be a finite number, got {value}.")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise ConfigError(f"{field.name} must be below 2**63, got {shown(value, 40)}.")
        if field.name in not_negative and value < 0:
            raise ConfigError(f"{field.name} must be at least 0, got {value}.")


def check_types(cls: type, options: Mapping[str, Any]) -> None:
    """Check that keywords of a row have the types that its fields are declared with; no tensors, so no shapes.

    Args:
        cls: a dataclass.
        options: keyword -> value, of its fields.

    Raises:
        ConfigError: a value of another type; its keyword is named.
    """
    hints = typing.get_type_hints(cls)
    for key, value in options.items():
        if isinstance(value, PLAIN) and not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key])) if isinstance(hints[key], type) else hints[key]
            raise ConfigError(f"{key} must be {wanted}, got {shown(repr(value))} ({type(value).__name__}).")


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return isinstance(value, str | int)  # which of them, the row says in its own words
    if origin in (tuple, list, Sequence):
        if isinstance(value, str):  # one name for several: the row says what it makes of that
            return True
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value)
    if origin is not None or not isinstance(hint, type):
        return True
    if hint in (int, float):
        return isinstance(value, numbers.Integral if hint is int else numbers.Real) and not isinstance(value, bool)
    return isinstance(value, hint)
