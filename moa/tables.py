"""Tables of rows by name, which other packages can add to: recipes, adapter families."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TypeVar

from .errors import ConfigError, unknown_name

Row = TypeVar("Row", bound=type)


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
