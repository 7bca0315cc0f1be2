"""Learned gates on one linear each, and constant weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..mixture import Branch, Site
from ..routers import (
    FixedRouter,
    LinearRouter,
    LocalizedRouter,
    RankedRouter,
    TaskEmbeddingRouter,
    ThresholdRouter,
)
from ..routers.balanced import check_bias_rate
from ..routers.linear import check_jitter
from ..routers.localized import check_kinds
from ..routers.ranked import check_ranks
from ..routers.table import check_size, check_tasks
from ..routers.threshold import check_threshold
from .balance import BalancedRecipe, LossRecipe
from .recipe import Folds, Recipe, TopKRecipe, register_recipe


@register_recipe("topk", "MoLoRA, arXiv 2309.05444; gate of Mixtral, arXiv 2401.04088")
@dataclass(frozen=True, kw_only=True)
class TopK(TopKRecipe, BalancedRecipe):
    """Softmax gate per linear, the k best experts, their weights renormalised.

    Args:
        z_loss: coefficient of the router z-loss, the mean of (log Σ exp logits)².
        jitter: in training only, the gate sees x times a draw from 1 - jitter to 1 + jitter.
        ranks: among which a second gate chooses for each row, where experts are elastic (expert="dylora"); none leaves
            all rows at one rank.

    Raises:
        ConfigError: ranks that the experts do not have.
    """

    sums_to_one = True
    coefficients = ("balance", "z_loss")

    z_loss: float = 0.001
    jitter: float = 0.0
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_jitter(self.jitter)
        object.__setattr__(self, "ranks", tuple(self.ranks))
        if self.ranks:
            check_ranks(self.ranks, self.largest_rank)
            if not self.family.elastic or "moe-experts" in self.targets:
                raise ConfigError(
                    f"ranks={self.ranks} needs experts that act at any rank, expert='dylora', on layers and not on the "
                    "base's own fused experts."
                )

    @property
    def folds(self) -> Folds:
        """One expert of a layer (*rows, i) -> (*rows, o) has the weight 1, but not one rank where a gate chooses it."""
        return "never" if self.ranks else super().folds

    def losses(self) -> dict[str, float]:
        """Return the coefficients of the balance and the z-loss; no tensors."""
        return {**super().losses(), "z": self.z_loss}

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i)."""
        router = LinearRouter(site.d_in, self.n_experts, self.k, jitter=self.jitter)
        if self.ranks:
            router = RankedRouter(site.d_in, self.n_experts, self.k, self.ranks, jitter=self.jitter)
        return [Branch(self.learning(router), self.bank(site))]


@register_recipe("dense", "soft mixture of LoRAs; gate of HydraLoRA, arXiv 2404.19245")
@dataclass(frozen=True, kw_only=True)
class Dense(LossRecipe):
    """Softmax gate per linear over all experts.

    Args:
        z_loss: coefficient of the router z-loss, the mean of (log Σ exp logits)².
    """

    sums_to_one = True
    coefficients = ("z_loss",)

    z_loss: float = 0.0

    def losses(self) -> dict[str, float]:
        """Return the coefficient of the z-loss, a number."""
        return {"z": self.z_loss}

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i), all experts."""
        router = LinearRouter(site.d_in, self.n_experts, self.n_experts)
        return [Branch(self.learning(router), self.bank(site))]


@register_recipe("switch", "Fedus et al. 2021, arXiv 2101.03961")
@dataclass(frozen=True, kw_only=True)
class Switch(TopKRecipe, BalancedRecipe):
    """The one best expert, weighted by its probability.

    Args:
        z_loss: coefficient of the router z-loss, the mean of (log Σ exp logits)².
        jitter: in training only, the gate sees x times a draw from 1 - jitter to 1 + jitter.

    Differs: no capacity limit, so no token is dropped and the routing stays causal and batch-invariant.
    """

    sums_to_one = True
    coefficients = ("balance", "z_loss")

    k: int = 1
    z_loss: float = 0.001
    jitter: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_jitter(self.jitter)

    def losses(self) -> dict[str, float]:
        """Return the coefficients of the balance and the z-loss; no tensors."""
        return {**super().losses(), "z": self.z_loss}

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i), weights not renormalised."""
        router = LinearRouter(site.d_in, self.n_experts, self.k, renormalize=False, jitter=self.jitter)
        return [Branch(self.learning(router), self.bank(site))]


@register_recipe("noisy_topk", "Shazeer et al. 2017, arXiv 1701.06538")
@dataclass(frozen=True, kw_only=True)
class NoisyTopK(TopKRecipe, LossRecipe):
    """Learned noise on the logits in training, softmax over the k kept, importance and load losses.

    Args:
        importance: coefficient of the loss on the spread of the experts' summed weights.
        load: coefficient of the loss on the spread of the experts' expected numbers of rows.
    """

    sums_to_one = True
    coefficients = ("importance", "load")

    importance: float = 0.01
    load: float = 0.01

    def losses(self) -> dict[str, float]:
        """Return the coefficients of the importance and the load loss; no tensors."""
        return {"importance": self.importance, "load": self.load}

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a noisy linear gate on x (*rows, i)."""
        router = LinearRouter(site.d_in, self.n_experts, self.k, noisy=True)
        return [Branch(self.learning(router), self.bank(site))]


@register_recipe("sigmoid", "DeepSeek-V3, arXiv 2412.19437; Wang et al. 2024, arXiv 2408.15664")
@dataclass(frozen=True, kw_only=True)
class Sigmoid(TopKRecipe):
    """Sigmoid scores, balanced by a selection bias that moves once per optimizer step; no auxiliary loss.

    Args:
        bias_rate: how far the bias of an expert moves per optimizer step, up where its load is below the mean.
    """

    sums_to_one = True

    bias_rate: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bias_rate(self.bias_rate)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a linear gate on x (*rows, i) with a selection bias (E,)."""
        router = LinearRouter(site.d_in, self.n_experts, self.k, score="sigmoid", bias_rate=self.bias_rate)
        return [Branch(router, self.bank(site))]


@register_recipe("fixed", "plain LoRA (n_experts=1) or the average of experts")
@dataclass(frozen=True, kw_only=True)
class Fixed(Recipe):
    """Every expert with the same weight 1/E on every row."""

    n_experts: int = 1

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: constant weights (E,)."""
        return [Branch(FixedRouter(site.d_in, self.n_experts), self.bank(site))]

    @property
    def folds(self) -> Folds:
        """Every input of a layer (*rows, i) -> (*rows, o) has the same weights."""
        return "always"


@register_recipe("adamole", "Liu and Luo 2024, arXiv 2405.00361")
@dataclass(frozen=True, kw_only=True)
class AdaMoLE(BalancedRecipe):
    """Softmax gate per linear; every expert whose probability passes a learned threshold.

    Args:
        max_threshold: the largest threshold; None is 1/E, with which at least one expert always passes.
        balance: coefficient of the balance loss.

    Source: arXiv 2405.00361, eq. 4-7; see `ThresholdRouter` for what differs.
    """

    sums_to_one = True

    rank: int | tuple[int, ...] = 32
    targets: str | tuple[str, ...] = "attention"
    max_threshold: float | None = None
    balance: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        check_threshold(self.max_threshold)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a gate with a threshold on x (*rows, i)."""
        router = ThresholdRouter(site.d_in, self.n_experts, max_threshold=self.max_threshold)
        return [Branch(self.learning(router), self.bank(site))]


@register_recipe("hydralora", "Tian et al. 2024, arXiv 2404.19245")
@dataclass(frozen=True, kw_only=True)
class HydraLoRA(Dense):
    """One shared down projection, E up projections, a softmax gate per linear over all of them; no auxiliary loss.

    Source: arXiv 2404.19245, eq. 4-5.
    Differs: rank 4, alpha 32 and 4 experts are the released script's; the class there has 2 experts by default.
    """

    n_experts: int = 4
    expert: str = "shared"
    rank: int | tuple[int, ...] = 4
    alpha: float | None = 32.0
    targets: str | tuple[str, ...] = "ffn"


@register_recipe("loramoe", "Dou et al. 2023, arXiv 2312.09979")
@dataclass(frozen=True, kw_only=True)
class LoRAMoE(LossRecipe):
    """Softmax gate per linear over all experts; localized balance: each half of them for one kind of task.

    Args:
        task_kinds: 0 or 1 for each task id (0 keeps world knowledge, 1 is the downstream tasks, say); empty balances
            all experts alike and needs no task ids.
        delta: δ, how much more weight the matching half should get.
        localized: coefficient of the loss.

    Source: arXiv 2312.09979, eq. 2-7.
    Differs: the released code has delta = 0 and the loss switched off by default; here both are 0.1, near the paper's.
    """

    sums_to_one = True
    coefficients = ("localized",)

    rank: int | tuple[int, ...] = 4
    alpha: float | None = 32.0
    targets: str | tuple[str, ...] = "ffn"
    task_kinds: tuple[int, ...] = ()
    delta: float = 0.1
    localized: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "task_kinds", tuple(self.task_kinds))
        super().__post_init__()
        check_kinds(self.task_kinds, self.delta)
        if not self.task_kinds:
            self.check_unused("task_kinds", "delta")

    def losses(self) -> dict[str, float]:
        """Return the coefficient of the localized loss, a number."""
        return {"localized": self.localized}

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a dense gate on x (*rows, i) that knows which expert is meant for which kind."""
        router = LocalizedRouter(site.d_in, self.n_experts, task_kinds=self.task_kinds, delta=self.delta)
        return [Branch(self.learning(router), self.bank(site))]


@register_recipe("moelora", "Liu et al. 2023, arXiv 2310.18339")
@dataclass(frozen=True, kw_only=True)
class MOELoRA(Recipe):
    """Softmax gate on an embedding of the task: each task has one mixture of LoRAs, which folds.

    Args:
        n_tasks: how many tasks.
        d_embedding: size of a task's embedding.
        unknown_tasks: "error", or "uniform" weights for tasks out of range.

    Source: arXiv 2310.18339, eq. 4-8.
    Differs: the released code cuts a total rank into E experts; here `rank` is each expert's, 2 as in its 16 / 8. Its
        table has one row more than there are tasks; here it does not.
    """

    n_tasks: int = 1
    rank: int | tuple[int, ...] = 2
    d_embedding: int = 64
    unknown_tasks: Literal["error", "uniform"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tasks(self.n_tasks, self.unknown_tasks)
        check_size("d_embedding", self.d_embedding)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a gate that looks only at the task of x (*rows, i)."""
        router = TaskEmbeddingRouter(
            site.d_in, self.n_experts, self.n_tasks, d_embedding=self.d_embedding, unknown=self.unknown_tasks
        )
        return [Branch(router, self.bank(site))]

    @property
    def folds(self) -> Folds:
        """Every input of one task has the same weights in a layer (*rows, i) -> (*rows, o)."""
        return "by task"
