"""`moa recipes`: the table of systems, and every keyword of one of them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import textwrap

from ..runs.processes import say
from .shared_options import Command, add_import

WIDTH = 110


def add(command: Command) -> None:
    """Add the command to a parser."""
    recipes = command("recipes", _recipes, "list the recipes, or every keyword of one")
    recipes.add_argument("name", nargs="?", help="of a recipe, or of an adapter family")
    add_import(recipes)


def _recipes(arguments: argparse.Namespace) -> None:
    """List the recipes with their papers; of one, every keyword with its type, default and meaning."""
    from ..errors import ConfigError, unknown_name
    from ..experts import FAMILIES
    from ..recipes import RECIPES

    if arguments.name is None:
        say("recipes (recipe.router, or moa.build(model, router=…)):")
        _table(RECIPES)
        say("", "adapter families (recipe.expert):")
        _table(FAMILIES)
        say("", "keywords of one: moa recipes NAME")
        return
    cls = RECIPES.get(arguments.name) or FAMILIES.get(arguments.name)
    if cls is None:
        raise ConfigError(unknown_name("recipe or family", arguments.name, [*RECIPES, *FAMILIES]))
    say(*_describe(cls).splitlines())


def _table(rows: dict[str, type]) -> None:
    width = max(map(len, rows))
    for name, cls in sorted(rows.items()):
        say(f"  {name:<{width}}  {_first_line(cls)}" + (f" [{cls.paper}]" if cls.paper else ""))  # type: ignore[attr-defined]


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _describe(cls: type) -> str:
    """Return a recipe or family in words: what it is, and its keywords."""
    paper, name = getattr(cls, "paper", ""), getattr(cls, "name", "")
    lines = [f"{name}: {_first_line(cls)}" + (f" [{paper}]" if paper else ""), ""]
    meanings = _meanings(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default is not dataclasses.MISSING else "…"
        lines.append(f"  {field.name}: {field.type}, default {default!r}")
        meaning = meanings.get(field.name, "")
        lines += textwrap.wrap(meaning, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if not dataclasses.fields(cls):
        lines.append("  it has no keywords of its own")
    return "\n".join(lines)


def _meanings(cls: type) -> dict[str, str]:
    """Return keyword -> its lines in the docstrings' Args, those of the class over those of what it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        name = None
        for line in text.partition("Args:\n")[2].partition("\n\n")[0].splitlines():
            if line.startswith("    ") and not line.startswith("     ") and ": " in line:
                name, _, meaning = line.strip().partition(": ")
                found[name] = meaning
            elif name is not None:
                found[name] += f" {line.strip()}"
    return found
