"""A model's mixtures from only its description, for an engine that has layers of its own in place of the base's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..layers import Site
from ..mixture import Mixture
from ..recipes import make_recipe
from ..recipes.lent import mixtures_with
from ..types import Context, Scope

Sizes = Mapping[str, tuple[int, int]]


class Mixtures(nn.Module):
    """Mixtures without a base, (*rows, i) -> (*rows, o), and what they share.

    Its tensors have the names of a checkpoint's, so that one loads the other.

    Args:
        recipes: of a checkpoint: keywords and names of layers.
        sizes: by the name of a layer: i, o.
        scope: gives them their context.
    """

    def __init__(self, recipes: Sequence[Mapping[str, Any]], sizes: Sizes, scope: Scope | None = None) -> None:
        super().__init__()
        self.by_name: dict[str, Mixture] = {}
        self.shared = nn.ModuleDict()
        self.branches = nn.ModuleList()  # in the order of by_name
        scope = Context() if scope is None else scope
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)  # an engine builds under the base's: routers and factors are wider
        try:
            for number, row in enumerate(recipes):
                options = {key: value for key, value in row.items() if key not in ("router", "layers")}
                recipe = make_recipe(row["router"], **options)
                sites = [_site(name, *sizes[name]) for name in row["layers"]]
                shared = recipe.shared(sites)
                if shared:
                    self.shared[str(number)] = nn.ModuleDict(shared)
                for mixture in mixtures_with(recipe, sites, shared, scope):
                    self.by_name[mixture.name] = mixture
                    self.branches.append(mixture.branches)
        finally:
            torch.set_default_dtype(before)
        self.requires_grad_(False).eval()

    def checkpoint_names(self) -> dict[str, str]:
        """Return the name in a checkpoint of each of this module's tensors (of any shape), by its own name."""
        layers = list(self.by_name)
        found = {}
        for name in self.state_dict():
            kind, number, rest = name.split(".", 2)
            found[name] = (
                f"shared_by_layers.{number}.{rest}"
                if kind == "shared"
                else f"base.{layers[int(number)]}.branches.{rest}"
            )
        return found


def _site(name: str, d_in: int, d_out: int) -> Site:
    return Site(name, nn.Linear(d_in, d_out, bias=False, device="meta"), d_in, d_out)
