"""MixLoRA: experts that are whole feed-forward blocks. Li et al. 2024, arXiv 2404.15159."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError
from ..experts import ExpertBank
from ..mixture import Branch, Mixture, Site, feed_forward_blocks, linear_sites, mixture_on
from ..mixture.blocks import routed_block
from ..routers import FixedRouter, LinearRouter
from ..routers.linear import check_jitter
from ..types import Scope
from .balance import BalancedRecipe
from .recipe import Recipe, TopKRecipe, register_recipe


@register_recipe("mixlora", "Li et al. 2024, arXiv 2404.15159")
@dataclass(frozen=True, kw_only=True)
class MixLoRA(TopKRecipe, BalancedRecipe):
    """One gate per feed-forward block; each expert is the frozen block with its own LoRA on every linear of it.

    y = Σ_{e in top-k} w_e FFN_e(x);  the target layers outside feed-forward blocks get one plain LoRA each

    Args:
        balance: coefficient of the balance loss.
        z_loss: of the z-loss.
        jitter: of the gate's input, in training.

    Source: arXiv 2404.15159, eq. 3-7.
    Differs: the released code has a balance coefficient of 1e-3, the paper 1e-2; theirs is k times ours (see
        `moa.objective.losses.balance_loss`), so 2e-3 here is the code's, on the rows of all layers together
        (balance_over="model"). Its gate starts from N(0, 0.02²). The frozen
        products of a block run once per token, whatever k.
    """

    places = ("input",)
    coefficients = ("balance", "z_loss")

    rank: int | tuple[int, ...] = 16
    dropout: float = 0.05
    balance: float = 0.002
    z_loss: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_jitter(self.jitter)

    def losses(self) -> dict[str, float]:
        """Return the coefficients of the balance and the z-loss; no tensors."""
        return {**super().losses(), "z": self.z_loss}

    def for_base(self, base: nn.Module) -> Recipe:
        """Return the recipe.

        Raises:
            ConfigError: of a feed-forward block (d -> f, f -> d) some layers are targets and others are not.
        """

        chosen = {site.name for site in self.sites(base)}
        for block in feed_forward_blocks(linear_sites(base)):
            names = [site.name for site in block]
            left = [name for name in names if name not in chosen]
            if left and names[-1] in chosen and len(left) < len(names) - 1:
                raise ConfigError(
                    f"an expert is a whole feed-forward block, and of {', '.join(names)} the targets leave out "
                    f"{', '.join(left)}: name all of them, or use targets='all-linear' or 'ffn'."
                )
        return self

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a plain LoRA on x (*rows, i), for layers outside feed-forward blocks."""
        return [Branch(FixedRouter(site.d_in, 1), self._bank(site, 1))]

    def mixtures(self, sites: Sequence[Site], scope: Scope) -> list[Mixture]:
        """Return the sites' layers, (*rows, i) -> (*rows, o): blocks with one gate each, plain LoRAs elsewhere.

        Raises:
            ConfigError: no feed-forward block is complete among the sites.
        """
        made: dict[str, Mixture] = {}
        blocks = feed_forward_blocks(sites)
        if not blocks:
            raise ConfigError(
                "no feed-forward block (layers d -> f, then one f -> d) is complete among the target layers "
                f"{', '.join(s.name for s in sites[:6])}: use targets='all-linear' or 'ffn'."
            )
        for block in blocks:
            members = []
            for site in block:
                router = self.learning(LinearRouter(site.d_in, self.n_experts, self.k, jitter=self.jitter))
                members.append((site.module, site.name, Branch(router, self._bank(site, self.n_experts))))
            for layer in routed_block(members[:-1], members[-1], scope):
                made[layer.name] = layer
        for site in sites:
            if site.name not in made:
                made[site.name] = mixture_on(site.module, self.branches(site), scope, site.name)
        return [made[site.name] for site in sites]

    def _bank(self, site: Site, n_experts: int) -> ExpertBank:
        return self.family.build(site, n_experts, site.shared.get("experts"), **self.bank_options())
