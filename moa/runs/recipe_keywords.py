"""The `recipe:` section: its keywords as values of their types, and what is wrong with them said without torch."""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from ..errors import ConfigError, unknown_name
from ..tables import check_common, check_keyword, check_places, check_used
from .written_rows import written_rows
from .yaml_values import typed


def typed_keywords(recipe: type, families: Iterable[type], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's keywords as their types want them.

    Args:
        recipe: row of the table of recipes.
        families: rows of the adapter families whose keywords stand beside it.
        options: keyword -> value of YAML; those that nobody has stay as they are.

    Raises:
        ConfigError: a value of another type; the keyword is named.
    """
    hints: dict[str, Any] = {}
    for row in (*families, recipe):
        hints |= typing.get_type_hints(row)
    hints["expert"] = Any
    return {key: typed(value, hints.get(key, Any), f"recipe: {key}") for key, value in options.items()}


def check_written(recipe: Mapping[str, Any], imports: bool = False) -> None:
    """Check a recipe against the rows as their files declare them; torch is not imported.

    What is checked: names, keywords, types and the ranges that every recipe has. What a recipe works out by itself,
    `moa.recipes.make_recipe` checks, which comes later; so it is left to it where it is imported already.

    Args:
        recipe: `recipe:` of a configuration.
        imports: modules are to be imported that may bring names which these files do not have.

    Raises:
        ConfigError: a name, keyword or value that cannot be.
    """
    rows, families = written_rows("register_recipe"), written_rows("register_expert")
    if not rows or "moa.recipes" in sys.modules:
        return
    options: dict[str, Any] = {"router": "topk", **recipe}
    options.pop("experts", None)
    name = typed(options.pop("router"), str, "recipe: router")
    row: Any = _row(rows, name, "router", "moa.recipes", imports)
    if row is None:
        return
    defaults = {field.name: field.default for field in dataclasses.fields(row)}
    expert = options.get("expert", defaults["expert"])
    entries = _entries(expert)
    found: list[Any] = []
    for entry in entries:
        family: Any = _row(families, entry.pop("family"), "expert family", "moa.experts", imports)
        if family is None:
            return
        found.append(family)
        fields = [field.name for field in dataclasses.fields(family)]
        for key in entry:
            if key not in fields:
                raise ConfigError(unknown_name("keyword", key, fields, f"the family {family.name!r}"))
    theirs = [field.name for family in found for field in dataclasses.fields(family) if field.name not in defaults]
    where = f"the recipe {name!r}" + (f" with expert={expert!r}" if theirs else "")
    known = [*defaults, *dict.fromkeys(theirs)]
    for key, value in options.items():
        if key not in known:
            check_keyword(row, key, value, known, where)
    values = typed_keywords(row, found, options)
    given = {key: value for key, value in values.items() if key in defaults and value != defaults[key]}
    check_common(given, row.coefficients)
    if len(found) == 1:
        several = isinstance(options.get("rank"), list)
        check_places(row, given.get("place"), found[0], several and len(set(options["rank"])) > 1)
        if not several:
            check_used(found[0].name, found[0].uses, options)


def _row(table: Mapping[str, type], name: str, kind: str, group: str, imports: bool) -> type | None:
    """Return the row of a name; None where it may be one of another package."""
    if name in table:
        return table[name]
    plugins = [entry.name for entry in entry_points(group=group)]
    if imports or name in plugins:
        return None
    raise ConfigError(unknown_name(kind, name, [*table, *plugins]))


def _entries(expert: Any) -> list[dict[str, Any]]:
    """Return {"family": name, keyword: value, …} for every family that `expert` names, in any of its forms."""
    several = list(expert) if isinstance(expert, Mapping | Sequence) and not isinstance(expert, str) else [expert]
    rows = [dict(one) if isinstance(one, Mapping) else {"family": one} for one in several]
    return [row for row in rows if isinstance(row.get("family"), str)]  # of others make_recipe says what is wrong
