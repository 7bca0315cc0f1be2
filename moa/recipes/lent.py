"""What all layers of a recipe share has one owner, the model: layers call it and do not hold it.

So it is moved, sharded and saved once, wherever its owner is, and its parameters are read in its own forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ..mixture import Mixture, Site
from ..types import Scope
from .recipe import Recipe


def mixtures_with(
    recipe: Recipe, sites: Sequence[Site], shared: Mapping[str, nn.Module], scope: Scope
) -> list[Mixture]:
    """Return a recipe's mixtures, (*rows, i) -> (*rows, o), to which what they share is lent.

    Args:
        recipe: of the layers.
        sites: of one model, in order.
        shared: what `Recipe.shared` returned; the caller owns it.
        scope: gives the mixtures the context of what runs.
    """
    mixtures = recipe.mixtures([dataclasses.replace(site, shared=shared) for site in sites], scope)
    for mixture in mixtures:
        lend(mixture.branches, shared.values())
    return mixtures


def lend(module: nn.Module, shared: Iterable[nn.Module]) -> None:
    """Make modules that lie below another one, whatever shapes they map, attributes of their users and no children."""
    owned = {id(inner) for other in shared for inner in other.modules()}
    for user in [user for user in module.modules() if id(user) not in owned]:
        for name, child in list(user.named_children()):
            if id(child) in owned:
                delattr(user, name)
                object.__setattr__(user, name, child)
