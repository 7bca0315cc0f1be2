"""Recipes and families of other packages: which module registers them, and what to say where it is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ..errors import ConfigError
from ..experts import FAMILIES
from ..experts.mixed import names_in
from .recipe import RECIPES, Recipe, make_recipe

OURS = __name__.partition(".")[0]
GROUPS = ("moa.recipes", "moa.experts")


def origins(recipe: Recipe) -> dict[str, str]:
    """Return name -> module of a recipe and its family, where moa does not have them; no tensors."""
    families = (type(recipe.family.of(expert)) for expert in range(recipe.n_experts))
    rows: tuple[Any, ...] = (type(recipe), *dict.fromkeys(families))
    return {row.name: row.__module__ for row in rows if row.__module__.partition(".")[0] != OURS}


def rebuilt(row: Mapping[str, Any], modules: Mapping[str, str], where: str) -> Recipe:
    """Return the recipe that a file describes; no tensors.

    Args:
        row: its keywords, and "router".
        modules: of recipes and families that are not moa's, by name.
        where: the file, for messages.

    Raises:
        ConfigError: a recipe or family whose module is not imported, or keywords that it does not take.
    """
    missing = unregistered(
        {name: module for name, module in modules.items() if name in (row["router"], *names_in(row.get("expert")))}
    )
    if missing is not None:
        raise ConfigError(f"{where}: {missing}")
    try:
        return make_recipe(**row)
    except ConfigError as error:
        raise ConfigError(f"{where}: its recipe {row['router']!r} cannot be built: {error}") from error


def unregistered(modules: Mapping[str, str]) -> str | None:
    """Return what to do about the first of some names that nothing here registers, None where all are; no tensors.

    Args:
        modules: name -> module that registers it.
    """
    plugins = {entry.name for group in GROUPS for entry in entry_points(group=group)}
    for name, module in modules.items():
        if name not in RECIPES and name not in FAMILIES and name not in plugins:
            return (
                f"recipe {name!r} comes from module {module}; import it first (--import {module}, or the path of its "
                ".py file)."
            )
    return None
