"""Families are rows: what an adapter is, with its own keywords. `@register_expert` puts one into the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from .. import tables
from ..errors import ConfigError, unknown_name
from ..layers import Site
from ..tables import COMMON
from .bank import ExpertBank

LAYERS = ("input", "output", "block")  # where the experts of most families can sit
PLACES = (*LAYERS, "sequential", "parallel")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of adapter; a subclass's fields are its keywords in `moa.build`, in a configuration and in a checkpoint.

    Attributes:
        places: where it can sit, the usual place first: on a layer's "input" x, on its "output" y0, after a "block"
            whose output is, or begins with, a tensor (B, S, d), or at an attention or feed-forward sub-layer of a
            block: "sequential", on its output, or "parallel", on its input.
        usual_scale: alpha / rank where alpha is not given.
        elastic: its experts act at any rank up to r, which a routing may choose row by row.
        uses: which of a recipe's keywords rank, alpha, dropout and engine it looks at; without alpha its scale is 1.

    Raises:
        ConfigError: a keyword out of range.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    places: ClassVar[tuple[str, ...]] = LAYERS
    usual_scale: ClassVar[float] = 2.0
    elastic: ClassVar[bool] = False
    uses: ClassVar[tuple[str, ...]] = COMMON

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank, (*rows, i) -> (*rows, o), for a site.

        Args:
            site: its layer, sizes and weight (o, i).
            n_experts: E.
            shared: what `shared` made, or None.
            options: rank, scaling, dropout and engine, as in `ExpertBank`.
        """
        raise NotImplementedError

    def place_of(self, name: str, place: str) -> str:
        """Return where the experts of one layer (i -> o) sit, one of `PLACES`.

        Args:
            name: of the layer.
            place: that was chosen for all layers of the recipe.
        """
        return place

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module | None:
        """Return what all layers of one recipe share, e.g. random bases (r, d), or None.

        The model owns it. Its parameters and persistent buffers are saved once; what a seed makes again is a buffer
        that is not persistent. Its method `step()`, if it has one, is called after each optimizer step, and its method
        `begin(banks)`, if it or a module in it has one, before each forward in eager mode, with the model's banks.

        Args:
            sites: all layers of the recipe, in order.
            options: rank, scaling, dropout and engine, as in `ExpertBank`.
        """
        return None

    def of(self, expert: int) -> Family:
        """Return the family of one expert: this one, in a bank that has one; no tensors, so no shapes."""
        return self

    def described(self) -> Any:
        """Return what `expert` is in a configuration or a checkpoint: the name; no tensors, so no shapes."""
        return self.name

    def keywords(self) -> dict[str, Any]:
        """Return the family's own keywords as plain values; no tensors, so no shapes."""
        return dataclasses.asdict(self)


FAMILIES: dict[str, type[Family]] = {}


def register_expert(name: str, paper: str = "") -> Callable[[type[Family]], type[Family]]:
    """Return a class decorator that adds a family to the table under a name.

    Raises:
        ConfigError: the name is taken by another class, a keyword is one that every recipe has, or a place is unknown.
    """

    def add(cls: type[Family]) -> type[Family]:
        for place in cls.places:
            if place not in PLACES:
                raise ConfigError(unknown_name("place", place, PLACES, f"the family {name!r}"))
        tables.put(FAMILIES, name, cls, "expert family")
        cls.name, cls.paper = name, paper
        return cls

    return add


def family_class(name: str) -> type[Family]:
    """Return the family registered under a name, plug-ins of the entry point group "moa.experts" included.

    Raises:
        ConfigError: no such family; the nearest known one is named.
    """
    return tables.find(FAMILIES, name, "expert family", "moa.experts", register_expert)


def make_family(name: str, options: Mapping[str, Any] | None = None) -> Family:
    """Return the family of a name with its keywords set.

    Raises:
        ConfigError: unknown name or keyword (the nearest known one is named), or a value out of range.
    """
    cls = family_class(name)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in options or {}:
        if key not in known:
            raise ConfigError(unknown_name("keyword", key, known, f"the family {name!r}"))
    tables.check_types(cls, options or {})
    made = cls(**(options or {}))
    tables.check_numbers(made)
    return made
