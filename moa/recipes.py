"""The table of systems: each recipe is a row that says which router and which bank a layer gets.

A row is a frozen dataclass: its fields are the keywords `moa.build` accepts for it, and what a checkpoint stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal

from torch import nn

from .errors import ConfigError, unknown_name
from .experts import BANKS, ExpertBank
from .mixture import Branch
from .routers import FixedRouter, LinearRouter, SampledRouter
from .routers.base import check_experts


@dataclass(frozen=True)
class Site:
    """One layer that gets experts: its dotted name, the module, its features i and o."""

    name: str
    module: nn.Module
    d_in: int
    d_out: int


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
        targets: "all-linear", "ffn", "attention", a tuple of name endings, or a regex on the whole name.
        engine: kernel engine by name; None lets the dispatcher choose.

    Raises:
        ConfigError: a value out of range.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    n_experts: int = 8
    k: int = 2
    expert: str = "lora"
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    engine: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        check_experts(self.n_experts, self.k)
        if self.expert not in BANKS:
            raise ConfigError(unknown_name("expert family", self.expert, BANKS))

    def build(self, site: Site) -> list[Branch]:
        """Return the branches of one site, whose module maps (*rows, i) to (*rows, o)."""
        raise NotImplementedError

    def scaling(self) -> float:
        """Return the factor on every expert's output: alpha / rank, with alpha = 2 · rank unless given."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    def bank(self, site: Site) -> ExpertBank:
        """Return a fresh bank for a site, (*rows, i) -> (*rows, o)."""
        options: dict[str, Any] = {"rank": self.rank, "scaling": self.scaling()}
        return BANKS[self.expert](
            site.d_in, site.d_out, self.n_experts, dropout=self.dropout, engine=self.engine, **options
        )

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


@register_recipe("topk", "MoLoRA, arXiv 2309.05444; gate of Mixtral, arXiv 2401.04088")
@dataclass(frozen=True, kw_only=True)
class TopK(Recipe):
    """Softmax gate per linear, the k best experts, their weights renormalised."""

    balance: float = 0.01
    z_loss: float = 0.001
    jitter: float = 0.0

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i)."""
        losses = {"balance": self.balance, "z": self.z_loss}
        router = LinearRouter(site.d_in, self.n_experts, self.k, jitter=self.jitter, losses=losses)
        return [Branch(router, self.bank(site))]


@register_recipe("dense", "soft mixture of LoRAs; gate of HydraLoRA, arXiv 2404.19245")
@dataclass(frozen=True, kw_only=True)
class Dense(Recipe):
    """Softmax gate per linear over all experts; k is ignored and set to n_experts."""

    z_loss: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", self.n_experts)
        super().__post_init__()

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i), all experts."""
        router = LinearRouter(site.d_in, self.n_experts, self.n_experts, losses={"z": self.z_loss})
        return [Branch(router, self.bank(site))]


@register_recipe("switch", "Fedus et al. 2021, arXiv 2101.03961")
@dataclass(frozen=True, kw_only=True)
class Switch(Recipe):
    """The one best expert, weighted by its probability.

    Differs: no capacity limit, so no token is dropped and the routing stays causal and batch-invariant.
    """

    k: int = 1
    balance: float = 0.01
    z_loss: float = 0.001
    jitter: float = 0.01

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i), weights not renormalised."""
        losses = {"balance": self.balance, "z": self.z_loss}
        router = LinearRouter(site.d_in, self.n_experts, self.k, renormalize=False, jitter=self.jitter, losses=losses)
        return [Branch(router, self.bank(site))]


@register_recipe("noisy_topk", "Shazeer et al. 2017, arXiv 1701.06538")
@dataclass(frozen=True, kw_only=True)
class NoisyTopK(Recipe):
    """Learned noise on the logits in training, softmax over the k kept, importance and load losses."""

    importance: float = 0.01
    load: float = 0.01

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a noisy linear gate on x (*rows, i)."""
        losses = {"importance": self.importance, "load": self.load}
        router = LinearRouter(site.d_in, self.n_experts, self.k, noisy=True, losses=losses)
        return [Branch(router, self.bank(site))]


@register_recipe("sigmoid", "DeepSeek-V3, arXiv 2412.19437; Wang et al. 2024, arXiv 2408.15664")
@dataclass(frozen=True, kw_only=True)
class Sigmoid(Recipe):
    """Sigmoid scores, balanced by a selection bias that moves once per optimizer step; no auxiliary loss."""

    bias_rate: float = 0.001

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i) with a selection bias (E,)."""
        router = LinearRouter(site.d_in, self.n_experts, self.k, score="sigmoid", bias_rate=self.bias_rate)
        return [Branch(router, self.bank(site))]


@register_recipe("remix", "Qiu et al. 2026, arXiv 2603.10160")
@dataclass(frozen=True, kw_only=True)
class ReMix(Recipe):
    """k experts sampled without replacement, constant weight ω, router trained by RLOO over M selections.

    ω = alpha / (k · rank) with scale="lora", alpha / √(k · rank) with "rslora"; alpha = 2 as in the paper.

    Args:
        samples: M, forwards per training step, at least 2.
        granularity: "token" or "sequence".
        scale: "rslora" (the paper's better one: GSM8K 55.72 against 53.30) or "lora".
    """

    targets: str | tuple[str, ...] = "ffn"
    samples: int = 2
    granularity: Literal["token", "sequence"] = "token"
    scale: Literal["lora", "rslora"] = "rslora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("lora", "rslora"):
            raise ConfigError(f"scale must be 'lora' or 'rslora', got {self.scale!r}.")
        SampledRouter(1, self.n_experts, self.k, samples=self.samples, granularity=self.granularity)

    def scaling(self) -> float:
        """Return ω."""
        active = self.k * self.rank
        return (2.0 if self.alpha is None else self.alpha) / (active if self.scale == "lora" else active**0.5)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a sampling router on x (*rows, i)."""
        router = SampledRouter(site.d_in, self.n_experts, self.k, samples=self.samples, granularity=self.granularity)
        return [Branch(router, self.bank(site))]


@register_recipe("fixed", "plain LoRA (n_experts=1) or the average of experts")
@dataclass(frozen=True, kw_only=True)
class Fixed(Recipe):
    """Every expert with the same weight 1/E on every row; k is ignored and set to n_experts."""

    n_experts: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", self.n_experts)
        super().__post_init__()

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: constant weights (E,)."""
        return [Branch(FixedRouter(site.d_in, self.n_experts), self.bank(site))]
