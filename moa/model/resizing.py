"""Experts added to a model, and removed from it, without building it anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, ConfigError
from ..formats.peft_experts import names_of
from ..formats.peft_native import Given, read_given
from ..formats.sharded import is_sharded
from ..mixture import Branch, Mixture, placement
from ..mixture.resize import Order, become, move_experts, move_shared, site_of, why_fixed
from ..recipes import Recipe
from ..recipes.lent import mixtures_with
from ..recipes.resized import resized
from .chosen import number_of
from .host import Host
from .turns import outside

Built = list[tuple[Recipe, list[Mixture], dict[str, nn.Module]]]


class Resized(Host):
    """A host whose number of experts can change."""

    @outside
    def add_expert(self, folder: str | Path | None = None, name: str | None = None) -> int:
        """Add an expert to every layer, the last, and return its number; what was learned stays bit for bit.

        A new row of a learned gate is drawn as `build` draws it, and Arrow's is the prototype of the new adapter: the
        weights of the old experts among each other do not change. Every parameter is a new one: make the optimizer
        anew.

        Args:
            folder: of a PEFT adapter, as in `build(…, experts=[…])`; None adds a fresh one, which changes nothing yet.
            name: of the expert; None takes the folder's where the others have names.

        Raises:
            ConfigError: the number of experts is fixed, by name; inside of a block, see `check_outside`; a name that
                is missing or taken; tensors that are sharded; an adapter of another family or of a higher rank.
            CheckpointError: a folder that cannot be read, or that adapts layers which carry no experts.
        """
        self._check_resizable("add_expert")
        given = None if folder is None else self._given(folder)
        if name is None and folder is not None and any(recipe.expert_names for recipe, _ in self.recipes):
            name = next(iter(names_of([folder])), None)
        number = max(recipe.n_experts for recipe, _ in self.recipes)
        self._resize(self._orders(lambda numbers: [*numbers, None]), name, given)
        return number

    @outside
    def remove_expert(self, expert: int | str) -> None:
        """Remove an expert from every layer; those behind it move up by one. Make the optimizer anew.

        Args:
            expert: its name or its number.

        Raises:
            ContextError: there is none of that name or number.
            ConfigError: the number of experts is fixed, by name; k experts act on a row and fewer would be left; inside
                of a block, see `check_outside`; tensors that are sharded.
        """
        self._check_resizable("remove_expert")
        number = number_of(expert, self.scope.names)
        most = max(recipe.n_experts for recipe, _ in self.recipes)
        if most == 1:
            raise ConfigError(f"expert {expert!r} is the only one that is left: unload() takes the mixture out.")
        self._resize(self._orders(lambda numbers: [e for e in numbers if e != number]))

    def _orders(self, change: Callable[[range], Order]) -> list[Order]:
        """Return the new order of each recipe's experts; one that has only one, where others have several, keeps it."""
        counts = [recipe.n_experts for recipe, _ in self.recipes]
        return [change(range(n)) if n > 1 or max(counts) == 1 else range(n) for n in counts]

    def _check_resizable(self, what: str) -> None:
        if any(is_sharded(parameter) for parameter in self.parameters()):
            raise ConfigError(f"{what} needs whole tensors, and these are sharded: do it before sharding the model.")
        if not self.recipes:
            raise ConfigError(f"{what}: this model has no experts: build it with moa.build.")
        for mixture in self.mixtures().values():
            reason = why_fixed(mixture)
            if reason is not None:
                raise ConfigError(f"{what} cannot change {reason}.")

    def _given(self, folder: str | Path) -> Given:
        """Return the adapter of a folder, having checked that it fits the experts that there are."""
        families = {recipe.family.name for recipe, _ in self.recipes}
        given = read_given([folder], self.base, "dora" if "dora" in families else None)
        missing = sorted(set(given.layers) - set(self.mixtures()))
        if missing:
            raise CheckpointError(f"{folder} adapts {', '.join(missing[:4])}, which carry no experts in this model.")
        wanted = {"expert": "lora", **given.keywords}
        wanted.pop("n_experts", None)
        for recipe, _ in self.recipes:
            here: dict[str, Any] = {"expert": recipe.family.name, "rank": recipe.rank}
            for name, value in wanted.items():
                own = here.get(name, getattr(recipe.family, name, getattr(recipe, name, None)))
                padded = name == "rank" and wanted["expert"] == "lora"  # a LoRA of a lower rank has room
                if not (value <= own if padded else value == own):
                    raise ConfigError(f"{folder} has {name}={value!r}, and the experts of this model {own!r}.")
        return given

    def _resize(self, orders: Sequence[Order], name: str | None = None, given: Given | None = None) -> None:
        """Build every layer anew, (*rows, i) -> (*rows, o), move its experts, and swap all of them in at the end."""
        own = self.mixtures()
        built: Built = []
        for number, ((recipe, names), order) in enumerate(zip(self.recipes, orders, strict=True)):
            new = resized(recipe, order, name)
            sites = [site_of(own[layer]) for layer in names]
            shared = self.shared_of(number)
            if "routers" in shared:
                fresh = new.shared(sites)["routers"]
                shared["routers"] = move_shared(shared["routers"], fresh, order, recipe.n_experts)
            mixtures = mixtures_with(new, sites, shared, self.scope)
            for mixture in mixtures:
                mixture.branches.to(*placement(mixture.base)).train(self.training)
            if given is not None:
                given.fill({mixture.name: mixture for mixture in mixtures}, names, first=recipe.n_experts)
            for mixture in mixtures:
                branches: list[Branch] = list(mixture.branches)  # type: ignore[arg-type]
                for branch in branches:
                    factors = branch.bank.factors()
                    if factors is not None:
                        branch.router.experts_changed(*factors)
            new.experts_changed(mixtures)
            for mixture in mixtures:
                move_experts(own[mixture.name], mixture, order)
            built.append((new, mixtures, shared))
        for number, (_, mixtures, shared) in enumerate(built):
            if shared:
                self.shared_by_layers[str(number)] = nn.ModuleDict(shared)
            for mixture in mixtures:
                become(own[mixture.name], mixture)
        self.recipes = [(new, names) for (new, *_), (_, names) in zip(built, self.recipes, strict=True)]
        self.routers_changed()
