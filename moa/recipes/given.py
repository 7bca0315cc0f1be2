"""Routers over adapters that a user already has: X-LoRA and Arrow. `moa.build(model, "xlora", experts=[…])`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ..mixture import Branch, Mixture, Site
from ..mixture.preview import hidden_width
from ..routers import PreviewRouter, PrototypeRouter
from ..types import Context
from .recipe import Recipe, register_recipe


@register_recipe("xlora", "Buehler and Buehler 2024, arXiv 2402.07148")
@dataclass(frozen=True, kw_only=True)
class XLoRA(Recipe):
    """A classifier on the frozen base's last hidden state weighs the frozen adapters, for every token.

    Args:
        k: experts per token; 0 is all of them.
        layerwise: every layer its own classifier; False is one for all layers.
        depth: linear layers of a classifier.
        width: of its inner layers.
        classifier_dropout: between them.
        temperature: of the softmax.
        score: "softmax" or "raw".
        renormalize: with k, a second softmax over the kept weights.
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
        self._router(Site("", nn.Identity(), 1, 1))

    def for_base(self, base: nn.Module) -> Recipe:
        """Return the recipe with d_hidden set to the base's.

        Raises:
            ConfigError: an encoder-decoder, or no transformers model.
        """
        return dataclasses.replace(self, d_hidden=hidden_width(base))

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a router with its own classifier, for x (*rows, i)."""
        return [Branch(self._router(site), self.bank(site))]

    def mixtures(self, sites: Sequence[Site], context: Context) -> list[Mixture]:
        """Return the mixtures of the sites, (*rows, i) -> (*rows, o), with one classifier unless layerwise."""
        out = super().mixtures(sites, context)
        routers = [mixture.branches[0].router for mixture in out]
        for router in routers[1:]:
            if not self.layerwise:
                assert isinstance(router, PreviewRouter) and isinstance(routers[0], PreviewRouter)
                router.follow(routers[0])
        return out

    def _router(self, site: Site) -> PreviewRouter:
        return PreviewRouter(
            site.d_in,
            self.n_experts,
            self.k,
            d_hidden=self.d_hidden or site.d_in,
            depth=self.depth,
            width=self.width,
            dropout=self.classifier_dropout,
            temperature=self.temperature,
            score=self.score,
            renormalize=self.renormalize,
        )


@register_recipe("arrow", "Ostapenko et al. 2024, arXiv 2405.11157")
@dataclass(frozen=True, kw_only=True)
class Arrow(Recipe):
    """Each layer weighs the adapters by how much of a token lies along what they amplify most; nothing is trained.

    Args:
        k: experts per token, 3 by default (all of them where there are fewer).
        temperature: of the softmax.

    Source: arXiv 2405.11157, §4; see `PrototypeRouter` for what differs.
    Differs: peft's subtraction of general knowledge from the adapters is a merge, not a routing: do it before.
    """

    wants_experts = True
    families = ("lora",)

    k: int = 3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", min(self.k, self.n_experts))
        super().__post_init__()
        PrototypeRouter(1, self.n_experts, self.k, temperature=self.temperature)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: prototypes of the site's experts, for x (*rows, i)."""
        router, bank = PrototypeRouter(site.d_in, self.n_experts, self.k, temperature=self.temperature), self.bank(site)
        factors = bank.factors()
        assert factors is not None
        router.experts_changed(*factors)
        return [Branch(router, bank)]
