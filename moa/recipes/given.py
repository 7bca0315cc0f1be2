"""Routers over adapters that a user already has: X-LoRA and Arrow. `moa.build(model, "xlora", experts=[…])`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..errors import ConfigError
from ..mixture import Branch, Mixture, Site
from ..mixture.preview import hidden_width
from ..routers import Classifier, PreviewRouter, PrototypeRouter
from ..routers.first_pass import check_scores
from ..routers.prototype import check_temperature
from ..types import Scope
from .recipe import Folds, Recipe, TopKRecipe, register_recipe


@register_recipe("xlora", "Buehler and Buehler 2024, arXiv 2402.07148")
@dataclass(frozen=True, kw_only=True)
class XLoRA(TopKRecipe):
    """A classifier on the frozen base's last hidden state weighs the frozen adapters, for every token.

    Args:
        k: experts per token; 0 is all of them.
        layerwise: every layer its own classifier; False is one for all layers.
        depth: linear layers of a classifier.
        width: of its inner layers.
        classifier_dropout: between them.
        temperature: of the softmax.
        score: "softmax" or "raw".
        renormalize: a second softmax over the kept weights.
        d_hidden: width of the base's last hidden state; filled in by `build`.

    Source: arXiv 2402.07148, §2; peft's X-LoRA.
    Differs: the weights multiply the adapters' outputs, which for LoRA equals multiplying their inputs. The first
        pass has no dropout, and a key-value cache of its own while decoding, where peft runs without any cache.
        It is not repeated where gradient checkpointing runs a block again, and works over a quantised base.
    """

    wants_experts = True

    k: int = 0
    layerwise: bool = False
    depth: int = 1
    width: int = 2048
    classifier_dropout: float = 0.2
    temperature: float = 1.0
    score: Literal["softmax", "raw"] = "softmax"
    renormalize: bool = False
    d_hidden: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", self.k or self.n_experts)
        super().__post_init__()
        check_scores(self.temperature, self.score)
        if self.depth < 1:
            raise ConfigError(f"depth must be at least 1, got {self.depth}.")
        if self.depth == 1:
            self.check_unused("inner layers of the classifier, depth > 1", "width", "classifier_dropout")

    @property
    def folds(self) -> Folds:
        """A softmax over the only expert of a layer (*rows, i) -> (*rows, o) is 1; a raw score is not."""
        only = self.n_experts == 1 and (self.score == "softmax" or self.renormalize)
        return "always" if only else "never"

    def for_base(self, base: nn.Module) -> Recipe:
        """Return the recipe with d_hidden set to the base's.

        Raises:
            ConfigError: an encoder-decoder, or a base outside transformers.
        """
        return dataclasses.replace(self, d_hidden=hidden_width(base))

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a router with a classifier of its own or that of all layers, for x (*rows, i)."""
        shared: Any = site.shared.get("routers")
        router = PreviewRouter(
            site.d_in,
            self.n_experts,
            self.k,
            classifier=self._classifier(site) if shared is None else shared,
            temperature=self.temperature,
            score=self.score,
            renormalize=self.renormalize,
        )
        return [Branch(router, self.bank(site))]

    def shared(self, sites: Sequence[Site]) -> dict[str, nn.Module]:
        """Return what all layers (*rows, i) -> (*rows, o) share: the classifier, unless layerwise."""
        own = {} if self.layerwise else {"routers": self._classifier(sites[0])}
        return {**super().shared(sites), **own}

    def _classifier(self, site: Site) -> Classifier:
        sizes = self.d_hidden or site.d_in, self.n_experts, self.depth, self.width
        return Classifier(*sizes, dropout=self.classifier_dropout)


@register_recipe("arrow", "Ostapenko et al. 2024, arXiv 2405.11157")
@dataclass(frozen=True, kw_only=True)
class Arrow(TopKRecipe):
    """Each layer weighs the adapters by how much of a token lies along what they amplify most; nothing is trained.

    Args:
        k: experts per token; 0 is 3, or all of them where there are fewer.
        temperature: of the softmax.
        tied: names of layers that have one prototype together where they stand side by side, e.g.
            ("q_proj", "k_proj", "v_proj"): they then choose alike. Empty: each layer has its own, as in peft.

    Source: arXiv 2405.11157, §4; see `PrototypeRouter` for what differs.
    Differs: the paper's experts have one A for q, k and v, and its code (microsoft/mttl, tie_params) one prototype:
        `tied`, which does not need one A. Its tie_op="sum", which adds the changes up, is not here, as it needs
        outputs of one size. peft's subtraction of general knowledge from the adapters is a merge, not a routing: do
        it before.
    """

    wants_experts = True
    sums_to_one = True
    families = ("lora",)

    k: int = 0
    temperature: float = 1.0
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", self.k or min(3, self.n_experts))
        if isinstance(self.tied, list):
            object.__setattr__(self, "tied", tuple(self.tied))
        if isinstance(self.tied, str) or len(self.tied) == 1:
            raise ConfigError(f"tied must name at least two layers, e.g. ('q_proj', 'k_proj'), got {self.tied!r}.")
        super().__post_init__()
        check_temperature(self.temperature)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: prototypes of the site's experts, for x (*rows, i)."""
        router, bank = PrototypeRouter(site.d_in, self.n_experts, self.k, temperature=self.temperature), self.bank(site)
        factors = bank.factors()
        assert factors is not None
        router.experts_changed(*factors)
        return [Branch(router, bank)]

    def mixtures(self, sites: Sequence[Site], scope: Scope) -> list[Mixture]:
        """Return the mixtures of the sites, (*rows, i) -> (*rows, o).

        Raises:
            ConfigError: no two layers side by side are tied, or two of them do not route rows of one size.
        """
        groups = self._side_by_side([site.name for site in sites])
        if self.tied and not groups:
            raise ConfigError(
                f"tied={self.tied} names no two layers side by side among {_some(s.name for s in sites)}."
            )
        out = super().mixtures(sites, scope)
        sizes = {mixture.name: _branch(mixture).router.d_in for mixture in out}
        for names in groups:
            if len({sizes[name] for name in names}) > 1:
                given = ", ".join(f"{name} ({sizes[name]})" for name in names)
                raise ConfigError(f"tied layers must route rows of one size, got {given}.")
        self.experts_changed(out)
        return out

    def experts_changed(self, mixtures: Sequence[Mixture]) -> None:
        """Find the prototypes of tied layers, (*rows, i) -> (*rows, o), again."""
        branches = {mixture.name: _branch(mixture) for mixture in mixtures}
        for names in self._side_by_side(list(branches)):
            found = [branches[name].bank.factors() for name in names]
            factors = [pair for pair in found if pair is not None]
            for name in names:
                router: Any = branches[name].router  # of `build`
                router.share(*factors)

    def _side_by_side(self, names: Sequence[str]) -> list[list[str]]:
        """Return the names of tied layers in groups of one parent, those of a single layer left out."""
        groups: dict[str, list[str]] = {}
        for name in names:
            parent, _, own = name.rpartition(".")
            if own in self.tied:
                groups.setdefault(parent, []).append(name)
        return [group for group in groups.values() if len(group) > 1]


def _branch(mixture: Mixture) -> Branch:
    branch = mixture.branches[0]
    assert isinstance(branch, Branch)
    return branch


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:6]) + (", …" if len(first) > 6 else "")
