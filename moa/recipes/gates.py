"""Learned gates on one linear each, and constant weights."""

from __future__ import annotations

from dataclasses import dataclass

from ..mixture import Branch
from ..routers import FixedRouter, LinearRouter
from .base import Recipe, Site, register_recipe


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
