"""FlyLoRA: rank-wise experts behind a frozen random projection. arXiv 2510.08396, NeurIPS 2025."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..experts import VectorBank
from ..mixture import Branch, Site
from ..routers import ProjectionRouter
from ..routers.balanced import check_bias_rate
from ..routers.projection import Choice, check_choice, check_nonzeros, layer_seed
from .recipe import TopKRecipe, register_recipe

MOST = 2**20  # ranks of one LoRA, each an expert


@register_recipe("flylora", "FlyLoRA, arXiv 2510.08396")
@dataclass(frozen=True, kw_only=True)
class FlyLoRA(TopKRecipe):
    """A LoRA of rank r whose frozen sparse A picks k of its r directions per row; only B is trained.

    f(x) = W x + alpha/r · Σ_{e in top-k(|A x| + d)} b_e (A x)_e

    The rank is the number of experts: give `rank` or `n_experts`, 32 if neither is given.

    Args:
        k: directions per row, 8 by default.
        seed: of the projections, each layer's derived from it and the layer's name. Adapters that will be merged
            should have different seeds: then their projections are nearly orthogonal (theorem 3.4).
        nonzeros: p, entries per direction; None is i · k / r.
        bias_rate: u, step of the selection bias d after each optimizer step; 0 for none.
        choice: by what the k directions are chosen: "magnitude", |A x| + d; "signed", A x + d (eq. 10 and the released
            fork of peft); "shifted", |A x + d| (the released flylora.py).

    Source: arXiv 2510.08396, eq. 7-11.
    Differs: the default choice and the bias's schedule, see `ProjectionRouter`. The released scripts use one seed
        for every task, so their projections are equal; theirs is also drawn anew per layer from one global stream,
        here each layer's is a function of seed and name. Dense merging of B A, as released, drops the top-k; folding
        refuses instead.
    """

    families = ("lora",)

    n_experts: int = 0
    rank: int = 0
    k: int = 8
    seed: int = 0
    nonzeros: int | None = None
    bias_rate: float = 1e-3
    choice: Choice = "magnitude"

    def __post_init__(self) -> None:
        size = self.n_experts or self.rank or 32
        if self.rank not in (0, size):
            raise ConfigError(
                f"in this recipe the rank is the number of experts: got rank={self.rank} and "
                f"n_experts={self.n_experts}. Give one of them."
            )
        if size > MOST:
            raise ConfigError(f"rank and n_experts, which are one here, must be at most {MOST}, got {size}.")
        object.__setattr__(self, "n_experts", size)
        object.__setattr__(self, "rank", size)
        super().__post_init__()
        check_choice(self.choice)
        self.check_unused("a low-rank kernel, which columns of B do not have", "engine")
        check_bias_rate(self.bias_rate)
        if self.nonzeros is not None:
            check_nonzeros(self.nonzeros)

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: the frozen projection of x (*rows, i) routes and weighs."""
        router = ProjectionRouter(
            site.d_in,
            self.n_experts,
            self.k,
            nonzeros=self.nonzeros,
            seed=layer_seed(self.seed, site.name),
            bias_rate=self.bias_rate,
            choice=self.choice,
        )
        options = {"scaling": self.scaling(), "dropout": self.dropout}
        bank = VectorBank(site.d_in, site.d_out, self.n_experts, directions=router.projection, **options)
        return [Branch(router, bank)]
