"""Another number of experts in each part of a model's depth. Gao et al. 2024 (MoLA), arXiv 2402.08562."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .recipe import Recipe, make_recipe


def by_depth(router: str, n_layers: int, n_experts: Sequence[int], **options: Any) -> list[Recipe]:
    """Return one recipe for each part of the depth, each with its own number of experts, for `moa.build`.

    The layers are cut into len(n_experts) parts, as equal as whole layers allow. MoLA's shapes are (2, 4, 6, 8) (more
    experts in higher layers, its best), (8, 6, 4, 2), (8, 2, 2, 8) and (5, 5, 5, 5).

    Args:
        router: name of a recipe.
        n_layers: how many blocks the model has, numbered from 0 in the names of its layers.
        n_experts: E of each part, lowest first.
        options: the recipe's other keywords, the same in each part; no targets: each part has all its linear layers.

    Returns:
        The recipes, lowest layers first.

    Raises:
        ConfigError: fewer layers than parts, or targets among the options.
    Source: arXiv 2402.08562, §3.2.
    """
    parts = len(n_experts)
    if not 1 <= parts <= n_layers:
        raise ConfigError(f"{n_layers} layers cannot be cut into {parts} parts.")
    if "targets" in options:
        raise ConfigError("by_depth chooses the layers: leave targets out.")
    bounds = [part * n_layers // parts for part in range(parts + 1)]
    recipes = []
    for part, count in enumerate(n_experts):
        numbers = "|".join(str(n) for n in range(bounds[part], bounds[part + 1]))
        # the first name part that is a number is the block's
        targets = rf"(?:[^.]*[^.\d][^.]*\.)*(?:{numbers})\..+"
        recipes.append(make_recipe(router, n_experts=count, targets=targets, **options))
    return recipes
