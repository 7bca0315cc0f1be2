"""A recipe with one expert more or less."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import ConfigError
from .recipe import Recipe


def resized(recipe: Recipe, order: Sequence[int | None], name: str | None = None) -> Recipe:
    """Return a recipe whose experts are those of another in some order, None for a new one; no tensors, so no shapes.

    A k that the recipe would have chosen by itself is chosen again.

    Args:
        recipe: with E experts.
        order: numbers of its experts.
        name: of the new one; experts that have numbers for names keep them where it has none.

    Raises:
        ConfigError: k is above the number of experts, the recipe does not have as many, or a name that is missing or
            taken.
    """
    names: list[str] = []
    if recipe.expert_names or name is not None:
        names = [name or "" if old is None else recipe.names[old] for old in order]
    changes = {"n_experts": len(order), "expert_names": tuple(names)}
    chosen = next((field for field in dataclasses.fields(recipe) if field.name == "k" and field.default == 0), None)
    if chosen is not None and dataclasses.replace(recipe, k=0).k == recipe.k:  # type: ignore[call-arg]
        return dataclasses.replace(recipe, **changes, k=0)  # type: ignore[arg-type,call-arg]
    if any(field.name == "k" for field in dataclasses.fields(recipe)) and recipe.k > len(order):
        raise ConfigError(
            f"{len(order)} of {recipe.n_experts} experts would be left, and k={recipe.k} act on a row: add one first, "
            f"or build with k={len(order)}."
        )
    return dataclasses.replace(recipe, **changes)  # type: ignore[arg-type]
