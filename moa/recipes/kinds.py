"""What a recipe's `expert`, `rank` and `place` come to: one family or several, where they fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from ..errors import ConfigError
from ..experts import Family, Mixed, make_family
from ..experts.family import family_class
from ..experts.mixed import in_turn, kind_of, kinds
from ..tables import check_places

MOST = 2**16  # experts of several kinds in one bank


class Wanted(Protocol):
    """What this file reads of a recipe, whose experts sit on layers (*rows, i) -> (*rows, o)."""

    name: ClassVar[str]
    families: ClassVar[tuple[str, ...] | None]
    places: ClassVar[tuple[str, ...]]

    @property
    def n_experts(self) -> int:
        """E."""

    @property
    def expert(self) -> Any:
        """What was asked for."""

    @property
    def rank(self) -> Any:
        """R of each expert, or a list."""

    @property
    def place(self) -> str | None:
        """Where they sit."""


def family_of(recipe: Wanted) -> tuple[Family, int | tuple[int, ...]]:
    """Return the family and the rank of a recipe's experts, (*rows, i) -> (*rows, o), lists gone through in turn.

    Raises:
        ConfigError: an unknown family, a rank below 1, a list that the experts cannot take in turn, several families
            without a common place, or a family or a place that the recipe does not have.
    """
    e, rank, names = recipe.n_experts, recipe.rank, kinds(recipe.expert)
    ranks = tuple(rank) if isinstance(rank, Sequence) and not isinstance(rank, str) else (rank,)
    if (names is not None or isinstance(rank, Sequence)) and e > MOST:
        raise ConfigError(f"experts of several kinds are made one by one: n_experts must be at most {MOST}, got {e}.")
    if isinstance(rank, Sequence):
        rank = ranks[0] if len(set(ranks)) == 1 else in_turn("rank", ranks, e)
    found: Family
    if names is not None:
        families = in_turn("expert", [kind_of(one, {})[0] for one in names], e)
        found = families[0] if all(f == families[0] for f in families) else Mixed(families=families)
    else:
        found = make_family(recipe.expert) if isinstance(recipe.expert, str) else recipe.expert
    if isinstance(rank, tuple) and not isinstance(found, Mixed):
        if "rank" not in found.uses:
            raise ConfigError(
                f"experts of the family {found.name!r} have no rank: rank={list(recipe.rank)} would do nothing."
            )
        found = Mixed(families=(found,) * e)
    if isinstance(found, Mixed) and len(found.families) != e:
        raise ConfigError(f"expert says what {len(found.families)} experts are, and n_experts is {e}.")
    check_places(recipe, recipe.place, found, several=isinstance(found, Mixed))
    return found, rank


def take_kinds(options: dict[str, Any], usual: Any, known: Sequence[str]) -> list[str]:
    """Take the keywords of families out of a recipe's, and return the names of all that these families have.

    Args:
        options: what was given; `expert` becomes what it comes to, and counts say n_experts where nobody does.
        usual: the recipe's own `expert`.
        known: the recipe's own keywords, which a family's of the same name do not take.

    Raises:
        ConfigError: an unknown family or keyword, or a value out of range.
    """
    expert = options.get("expert", usual)
    names = kinds(expert)
    entries = (expert,) if names is None else names
    theirs: dict[str, None] = {}
    for one in entries:
        name = one.get("family") if isinstance(one, Mapping) else one
        if isinstance(name, str):
            theirs |= {f.name: None for f in dataclasses.fields(family_class(name)) if f.name not in known}
    own = {key: options[key] for key in theirs if key in options}
    made = [kind_of(one, own) for one in entries]
    for key in {key for _, taken in made for key in taken}:
        options.pop(key)
    if own or "expert" in options:
        options["expert"] = made[0][0] if names is None else tuple(family for family, _ in made)
    if isinstance(expert, Mapping):
        options.setdefault("n_experts", len(entries))
        if options["n_experts"] != len(entries):
            raise ConfigError(f"expert counts {len(entries)} experts, and n_experts is {options['n_experts']}.")
    return list(theirs)
