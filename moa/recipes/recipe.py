"""The table of systems: each recipe is a row that says which router and which bank a layer gets.

A row is a frozen dataclass: its fields are the keywords `moa.build` accepts for it, and what a checkpoint stores.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from .. import tables
from ..errors import ConfigError, UnusedKeywordWarning, unknown_name
from ..experts import ExpertBank, Family, Mixed
from ..experts.family import PLACES
from ..experts.mixed import Kinds
from ..kernels import engines
from ..mixture import Branch, Mixture, Site, experts_branches, matrix_sites, mixture_on, parallel_layers
from ..mixture.streams import Streams
from ..types import Scope
from .kinds import family_of, take_kinds
from .targets import Targets

Folds = Literal["always", "by task", "never"]


@dataclass(frozen=True, kw_only=True)
class Recipe(Targets):
    """A row of the table; subclasses add their keywords and say how a site is built.

    Args:
        n_experts: E.
        expert: adapter family: a name in `moa.experts.FAMILIES`, or a `Family`. In `moa.build` the family's own
            keywords stand beside the recipe's. Several families in one bank: a list that the experts take in turn,
            ["lora", "shira"], whose entries may also be {"family": name, keyword: value}, or how many experts each
            has, {"lora": 6, "shira": 2}.
        place: where the experts sit: on a layer's "input" or "output", after a "block", or at the sub-layers of blocks
            that targets names, "sequential" or "parallel"; None is the family's usual place.
        rank: r of each expert, or a list that the experts take in turn, [4, 8, 16, 32].
        alpha: the experts' output is scaled by alpha / rank; None is the recipe's own rule, 2 · rank in most.
        dropout: probability on the experts' input in training.
        engine: kernel engine by name; None lets the dispatcher choose.
        train_experts: False freezes the experts, so that only the routers learn; the default with `experts=[…]`.
        expert_names: names of the experts, by which `adapter_ids` and `pin_expert` know them; empty for their numbers.
            With `experts=[…]` the default is the folders' names, unless two are the same or one is a number.

    Attributes:
        wants_experts: it routes over adapters that exist already, `moa.build(…, experts=[…])`.
        sums_to_one: its weights have the sum 1 on every row, so that the weight of the only expert is 1.
        families: names that `expert` may have; None is every family.
        places: that `place` may name.
        unused: a keyword of other recipes that changes nothing here -> why; `make_recipe` warns where it is given.
        refused: one that contradicts this recipe -> why; `make_recipe` raises.
        coefficients: keywords that weigh a loss; a negative one would train towards what the loss is against.
        scales: keywords that only set the factor on the experts' output, which adapters read in bring along.

    Raises:
        ConfigError: a value out of range, or a family or a place that does not fit this recipe.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    wants_experts: ClassVar[bool] = False
    sums_to_one: ClassVar[bool] = False
    families: ClassVar[tuple[str, ...] | None] = None
    places: ClassVar[tuple[str, ...]] = PLACES
    unused: ClassVar[Mapping[str, str]] = {"k": "every expert may act on every row"}
    refused: ClassVar[Mapping[str, str]] = {}
    coefficients: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ("alpha",)

    n_experts: int = 8
    expert: Kinds = "lora"
    place: str | None = None
    rank: int | tuple[int, ...] = 8
    alpha: float | None = None
    dropout: float = 0.0
    engine: str | None = None
    train_experts: bool = True
    expert_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.expert_names
        object.__setattr__(self, "expert_names", (names,) if isinstance(names, str) and names else tuple(names))
        tables.check_common({f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, self.coefficients)
        family, rank = family_of(self)
        object.__setattr__(self, "expert", family)
        object.__setattr__(self, "rank", rank)
        if self.engine is not None and self.engine not in engines():
            raise ConfigError(unknown_name("engine", self.engine, engines()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the experts, in order."""
        return self.expert_names or tuple(map(str, range(self.n_experts)))

    @property
    def family(self) -> Family:
        """What an expert is."""
        assert isinstance(self.expert, Family)
        return self.expert

    @property
    def where(self) -> str:
        """The place of the experts, one of `PLACES`."""
        return self.place or next(place for place in self.family.places if place in self.places)

    @property
    def k(self) -> int:
        """K, the experts that may act on a row: all of them, unless the recipe has k as a keyword."""
        return self.n_experts

    def check_unused(self, needs: str, *keywords: str) -> None:
        """Check that keywords which nothing reads in this recipe, as it is set, have their default.

        Args:
            needs: what would make them count.
            keywords: their names.

        Raises:
            ConfigError: one of them was set.
        """
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in keywords and value != field.default:
                raise ConfigError(f"{field.name}={value!r} changes nothing here: it needs {needs}.")

    def sites(self, base: nn.Module) -> list[Site]:
        """Return the layers or blocks of a base, (*rows, i) -> (*rows, o), that this recipe is for, in order.

        Raises:
            ConfigError: there are none, or a keyword names what the base has not.
        """
        return self.sites_at(base, self.where)

    def build(self, site: Site) -> list[Branch]:
        """Return the branches of one site, whose module maps (*rows, i) to (*rows, o)."""
        raise NotImplementedError

    def branches(self, site: Site) -> list[Branch]:
        """Return the branches of one site at the recipe's place: on the output, x is y0 (*rows, o)."""
        if parts := matrix_sites(site):
            return experts_branches([(self._at_place(part), n_matrices) for part, n_matrices in parts], site.name)
        return self._at_place(site)

    def _at_place(self, site: Site) -> list[Branch]:
        place = self.family.place_of(site.name, self.where)
        if place == "input":
            return self.build(site)
        branches = self.build(dataclasses.replace(site, d_in=site.d_out, place=place))
        for branch in branches:
            branch.tap = "output"
        return branches

    def shared(self, sites: Sequence[Site]) -> dict[str, nn.Module]:
        """Return what all layers (*rows, i) -> (*rows, o) share, by who calls it: "experts" or "routers"."""
        return {"experts": found} if (found := self.family.shared(sites, **self.bank_options())) is not None else {}

    def mixtures(self, sites: Sequence[Site], scope: Scope) -> list[Mixture]:
        """Return one mixture for each site, (*rows, i) -> (*rows, o); recipes whose sites share something override it.

        Args:
            sites: of one model, in order.
            scope: gives the mixtures the context of what runs.
        """
        if self.where == "parallel":
            return parallel_layers(sites, self.build, scope)
        return [mixture_on(site.module, self.branches(site), scope, site.name) for site in sites]

    def experts_changed(self, mixtures: Sequence[Mixture]) -> None:
        """Take note of low-rank experts read in or trained, where layers (*rows, i) look at each other's.

        Args:
            mixtures: this recipe's, of one model.
        """

    @property
    def folds(self) -> Folds:
        """Whether a layer (*rows, i) -> (*rows, o) becomes one weight: "always", for one task, or "never".

        It holds for experts that are weight changes, as LoRAs are; others do not fold behind any routing.
        """
        return "always" if self.sums_to_one and self.n_experts == 1 else "never"

    def for_base(self, base: nn.Module) -> Recipe:
        """Return the recipe with what it has to know of the whole model filled in, e.g. its width d.

        Raises:
            ConfigError: the model is of a kind that the recipe does not work on.
        """
        return self

    def streams(self, base: nn.Module, names: Sequence[str], scope: Scope) -> Streams | None:
        """Return the streams in which the base runs its batch (B, …), or None for a recipe that has one.

        Args:
            base: with the recipe's mixtures inside.
            names: of their layers.
            scope: of the mixtures.
        """
        return None

    def scaling(self) -> float:
        """Return the factor on every expert's output: alpha / rank, with the family's usual one unless alpha is given.

        It is 2 in most families, alpha = 2 · rank.
        """
        return self.family.usual_scale if self.alpha is None else self.alpha / self.largest_rank

    def bank(self, site: Site) -> ExpertBank:
        """Return a fresh bank for a site, (*rows, i) -> (*rows, o)."""
        return self.family.build(site, self.n_experts, site.shared.get("experts"), **self.bank_options())

    @property
    def largest_rank(self) -> int:
        """The largest r of the experts: that of each, where it is not a list."""
        return self.rank if isinstance(self.rank, int) else max(self.rank)

    def like(self, expert: int) -> Recipe:
        """Return the recipe whose experts are all what one of them is, (*rows, i) -> (*rows, o)."""
        rank = self.rank if isinstance(self.rank, int) else self.rank[expert]
        return dataclasses.replace(self, expert=self.family.of(expert), rank=rank, place=self.where)

    def bank_options(self) -> dict[str, Any]:
        """Return the keywords of every bank: rank, scaling, dropout, engine, or those of each expert; plain values."""
        if isinstance(self.family, Mixed):
            return {"each": [self.like(expert).bank_options() for expert in range(self.n_experts)]}
        scaling = self.scaling() if "alpha" in self.family.uses else 1.0
        return {"rank": self.largest_rank, "scaling": scaling, "dropout": self.dropout, "engine": self.engine}

    def adapted(self, new_task: int, mode: str, collapse: bool = False) -> Recipe:
        """Return the recipe that learns one new task from what this one has learned; see `MoAModel.adapt`.

        Raises:
            ConfigError: this recipe has nothing that belongs to a task.
        """
        raise ConfigError(f"recipe {self.name!r} does not route by task: there is nothing to adapt to a new one.")

    def carry_over(self, old: Sequence[Branch], new: Sequence[Branch]) -> None:
        """Copy the experts of a layer's old branches, (*rows, i) -> (*rows, o), into the adapted ones."""
        for source, target in zip(old, new, strict=True):
            target.bank.load_state_dict(source.bank.state_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values, its name under "router"."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        unused = {name for name in tables.COMMON if name not in self.family.uses}
        kept = {name: value for name, value in own.items() if name not in unused}
        return {"router": self.name, **kept, "expert": self.family.described(), **self.family.keywords()}


@dataclass(frozen=True, kw_only=True)
class TopKRecipe(Recipe):
    """A row whose router chooses a fixed number of experts.

    Args:
        k: K, experts per row.

    Raises:
        ConfigError: k is not in 1 … n_experts.
    """

    k: int = 2


RECIPES: dict[str, type[Recipe]] = {}


def register_recipe(name: str, paper: str = "") -> Callable[[type[Recipe]], type[Recipe]]:
    """Return a class decorator that adds a recipe to the table under a name.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def add(cls: type[Recipe]) -> type[Recipe]:
        tables.put(RECIPES, name, cls, "recipe")
        cls.name, cls.paper = name, paper
        return cls

    return add


def recipe_class(name: str) -> type[Recipe]:
    """Return the recipe registered under a name, plug-ins of the entry point group "moa.recipes" included.

    Raises:
        ConfigError: no such recipe; the nearest known one is named.
    """
    return tables.find(RECIPES, name, "router", "moa.recipes", register_recipe)


def make_recipe(router: str, **options: Any) -> Recipe:
    """Return the recipe named by router with its keywords set; one that changes nothing there gets a warning.

    Raises:
        ConfigError: unknown name or keyword (the nearest known one is named), or a value out of range.
    """
    cls = recipe_class(router)
    known = [field.name for field in dataclasses.fields(cls)]
    usual = next(f.default for f in dataclasses.fields(cls) if f.name == "expert")
    family = options.get("expert", usual)
    theirs = take_kinds(options, usual, known)
    for key in [key for key in options if key not in known]:
        value = options.pop(key)
        where = f"the recipe {router!r}" + (f" with expert={family!r}" if theirs else "")
        tables.check_keyword(cls, key, value, [*known, *theirs], where)
        message = f"{key}={value!r} changes nothing in the recipe {router!r}: {cls.unused[key]}."
        warnings.warn(message, UnusedKeywordWarning, stacklevel=2)
    tables.check_types(cls, options)
    made = cls(**options)
    tables.check_used(made.family.name, made.family.uses, options)
    return made
