"""X-Cross: streams of domain adapters that read each other after every block. arXiv 2504.20859, SIGIR 2025."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..mixture import Branch, Site
from ..mixture.hooks import check_hooks_run
from ..mixture.preview import hidden_width
from ..mixture.streams import Streams, find_body
from ..routers import IdRouter
from ..types import Scope
from .recipe import Recipe, register_recipe


@register_recipe("xcross", "X-Cross, arXiv 2504.20859")
@dataclass(frozen=True, kw_only=True)
class XCross(Recipe):
    """One stream of the model per frozen domain adapter; after every block each stream reads the others.

    The crossings, the streams' weights at the end and the head are what is trained.

    Args:
        beta: β of the direct terms.
        gamma: γ of the difference terms.

    Source: arXiv 2504.20859, §3, as far as public accounts give its equations; see `moa.mixture.streams`.
    Differs: the paper's β, γ, its start of W and whether z is per token are not public: here 1, 1, zero (the model
        starts as the mean of the adapted ones) and per token. One forward runs all streams, folded into the batch.
    """

    wants_experts = True
    places = ("input", "output")
    unused: ClassVar[Mapping[str, str]] = {}
    refused: ClassVar[Mapping[str, str]] = {"k": "a stream has one expert"}

    beta: float = 1.0
    gamma: float = 1.0

    @property
    def k(self) -> int:
        """K: one expert for each stream."""
        return 1

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: expert m for the rows (n · B, …) of stream m."""
        return [Branch(IdRouter(site.d_in, self.n_experts), self.bank(site))]

    def for_base(self, base: nn.Module) -> Recipe:
        """Return the recipe.

        Raises:
            ConfigError: an encoder-decoder, or a model whose width is not known.
        """
        if not hasattr(getattr(base, "config", None), "text_config"):  # of several parts: the streams' has its own
            hidden_width(base)
        return self

    def streams(self, base: nn.Module, names: Sequence[str], scope: Scope) -> Streams:
        """Return the streams of the base, whose crossings have weights (2 n (n − 1), n · d).

        Raises:
            ConfigError: layers outside one stack of blocks, a body that is compiled already, or one whose width is not
                known.
        """
        body, blocks = find_body(base, names)
        width = hidden_width(body)
        check_hooks_run(base, [body, *blocks])
        return Streams(self.n_experts, width, body, blocks, scope, beta=self.beta, gamma=self.gamma)
