"""The table of systems: each recipe is a row that says which router and which bank a layer gets.

A row is a frozen dataclass: its fields are the keywords `moa.build` accepts for it, and what a checkpoint stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar

from torch import nn

from ..errors import ConfigError, unknown_name
from ..experts import BANKS, ExpertBank
from ..kernels import engines
from ..mixture import Branch, Mixture, Site, mixture_on
from ..mixture.streams import Streams
from ..routers.router import check_experts
from ..types import Context


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A row of the table; subclasses add their keywords and say how a site is built.

    Args:
        n_experts: E.
        k: K, experts per row.
        expert: adapter family, a name in `moa.experts.BANKS`.
        rank: r of each expert.
        alpha: the experts' output is scaled by alpha / rank; None is the recipe's own rule, 2 · rank in most.
        dropout: probability on the experts' input in training.
        targets: "all-linear", "ffn", "attention", a tuple of name endings, or a regex on the whole name; the last two
            find convolutions too.
        engine: kernel engine by name; None lets the dispatcher choose.
        train_experts: False freezes the experts, so that the routers alone learn; the default with `experts=[…]`.

    Attributes:
        wants_experts: it routes over adapters that exist already, `moa.build(…, experts=[…])`.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    wants_experts: ClassVar[bool] = False

    n_experts: int = 8
    k: int = 2
    expert: str = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    engine: str | None = None
    train_experts: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        check_experts(self.n_experts, self.k)
        if self.expert not in BANKS:
            raise ConfigError(unknown_name("expert family", self.expert, BANKS))
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, got {self.rank}.")
        if self.engine is not None and self.engine not in engines():
            raise ConfigError(unknown_name("engine", self.engine, engines()))

    def build(self, site: Site) -> list[Branch]:
        """Return the branches of one site, whose module maps (*rows, i) to (*rows, o)."""
        raise NotImplementedError

    def mixtures(self, sites: Sequence[Site], context: Context) -> list[Mixture]:
        """Return one mixture for each site, (*rows, i) -> (*rows, o); recipes whose sites share something override it.

        Args:
            sites: of one model, in order.
            context: shared by the mixtures.
        """
        return [mixture_on(site.module, self.build(site), context, site.name) for site in sites]

    def for_base(self, base: nn.Module) -> Recipe:
        """Return the recipe with what it has to know of the whole model filled in, e.g. its width d.

        Raises:
            ConfigError: the model is of a kind that the recipe does not work on.
        """
        return self

    def streams(self, base: nn.Module, names: Sequence[str], context: Context) -> Streams | None:
        """Return the streams in which the base runs its batch (B, …), or None for a recipe that has one.

        Args:
            base: with the recipe's mixtures inside.
            names: of their layers.
            context: of the mixtures.
        """
        return None

    def scaling(self) -> float:
        """Return the factor on every expert's output: alpha / rank, with alpha = 2 · rank unless given."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    def bank(self, site: Site) -> ExpertBank:
        """Return a fresh bank for a site, (*rows, i) -> (*rows, o)."""
        options = {"rank": self.rank, "scaling": self.scaling(), "dropout": self.dropout, "engine": self.engine}
        return BANKS[self.expert](site.d_in, site.d_out, self.n_experts, **options)  # type: ignore[arg-type]

    def adapted(self, new_task: int, mode: str, collapse: bool = False) -> Recipe:
        """Return the recipe that learns one new task from what this one has learned; see `MoAModel.adapt`.

        Raises:
            ConfigError: this recipe has nothing that belongs to a task.
        """
        raise ConfigError(f"recipe {self.name!r} does not route by task: there is nothing to adapt to a new one.")

    def carry_over(self, old: Sequence[Branch], new: Sequence[Branch]) -> None:
        """Copy what the adapted branches of a layer, (*rows, i) -> (*rows, o), keep of the old ones: the experts."""
        for source, target in zip(old, new, strict=True):
            target.bank.load_state_dict(source.bank.state_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values, its name under "router"."""
        return {"router": self.name, **dataclasses.asdict(self)}


RECIPES: dict[str, type[Recipe]] = {}


def register_recipe(name: str, paper: str = "") -> Callable[[type[Recipe]], type[Recipe]]:
    """Return a class decorator that adds a recipe to the table under a name.

    Raises:
        ConfigError: the name is taken by another class.
    """

    def add(cls: type[Recipe]) -> type[Recipe]:
        taken = RECIPES.get(name)
        if taken is not None and taken.__qualname__ != cls.__qualname__:
            raise ConfigError(
                f"recipe {name!r} is already {taken.__module__}.{taken.__qualname__}: choose another name."
            )
        cls.name, cls.paper = name, paper
        RECIPES[name] = cls
        return cls

    return add


def recipe_class(name: str) -> type[Recipe]:
    """Return the recipe registered under a name, plug-ins of the entry point group "moa.recipes" included.

    Raises:
        ConfigError: no such recipe; the nearest known one is named.
    """
    if name not in RECIPES:
        for entry in entry_points(group="moa.recipes"):
            if entry.name == name:
                register_recipe(name)(entry.load())
    if name not in RECIPES:
        known = [*RECIPES, *(entry.name for entry in entry_points(group="moa.recipes"))]
        raise ConfigError(unknown_name("router", name, known))
    return RECIPES[name]


def make_recipe(router: str, **options: Any) -> Recipe:
    """Return the recipe named by router with its keywords set.

    Raises:
        ConfigError: unknown name or keyword (the nearest known one is named), or a value out of range.
    """
    cls = recipe_class(router)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            raise ConfigError(unknown_name("keyword", key, known, f"the recipe {router!r}"))
    return cls(**options)
