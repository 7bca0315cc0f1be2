"""Hydra: a parallel and a sequential low-rank branch. Kim et al. 2023, arXiv 2309.06922."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..experts import Affine, ExpertBank
from ..mixture import Branch, Site
from ..routers import FixedRouter, LinearRouter, Router
from .balance import BalancedRecipe
from .recipe import Folds, TopKRecipe, register_recipe

# names of the layers that write to the residual stream, where the paper puts its branches
OUTPUT_PROJECTIONS = r".*\.(down_proj|fc2|c_proj|wo|w2|lin2|linear2|output\.dense|dense_4h_to_h)"


@register_recipe("hydra", "Kim et al. 2023, arXiv 2309.06922")
@dataclass(frozen=True, kw_only=True)
class Hydra(TopKRecipe, BalancedRecipe):
    """Two low-rank branches on a layer: one on its input, one on its frozen output; both fold exactly.

    y0 = W x + b;  y = y0 + s_p B_p A_p x + s_q B_q A_q y0

    Args:
        rank: of the parallel branch.
        sequential_rank: of the sequential branch; None is the same.
        alpha: a branch is scaled by alpha / its rank; None is the paper's scale of 1.
        biases: a bias after each factor, as in the paper's vision models; folds too.
        gate: None; "branches" multiplies each branch by a learned sigmoid of what it taps; "experts" gives each branch
            n_experts experts behind a softmax gate of their own. A gated model does not fold.
        balance: coefficient of the balance loss of gate="experts".

    Source: arXiv 2309.06922, eq. 4-7.
    Differs: the released language code sets `apply_hyra` and reads `apply_hydra`, so that its branch does not run; the
        released VTAB fold multiplies the attention branch by the wrong layer's weight. The gates are not the paper's.
        On a convolution (name it in targets) the parallel branch is one of rank r, the sequential one 1 × 1.
    """

    families = ("lora",)
    places = ("input",)

    n_experts: int = 1
    k: int = 1
    rank: int = 4
    targets: str | tuple[str, ...] = OUTPUT_PROJECTIONS
    sequential_rank: int | None = None
    biases: bool = False
    gate: Literal["branches", "experts"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in (None, "branches", "experts"):
            raise ConfigError(f"gate must be None, 'branches' or 'experts', got {self.gate!r}.")
        if self.gate != "experts" and self.n_experts != 1:
            raise ConfigError(
                f"n_experts={self.n_experts} needs gate='experts': without it each branch is one pair of factors."
            )
        if self.gate != "experts":
            self.check_unused("gate='experts'", "balance", "balance_over", "losses_over")

    def build(self, site: Site) -> list[Branch]:
        """Return two branches: on the layer's input (*rows, i) and on its output (*rows, o)."""
        second = self.largest_rank if self.sequential_rank is None else self.sequential_rank
        parallel = Branch(self._router(site.d_in), self._bank(site, self.largest_rank))
        after = dataclasses.replace(site, d_in=site.d_out)
        sequential = Branch(self._router(site.d_out), self._bank(after, second), "output")
        return [parallel, sequential]

    @property
    def folds(self) -> Folds:
        """Without a gate both branches of a layer (*rows, i) -> (*rows, o) are always on."""
        return "always" if self.gate is None or (self.gate == "experts" and self.n_experts == 1) else "never"

    def _router(self, d_in: int) -> Router:
        if self.gate is None:
            return FixedRouter(d_in, 1)
        if self.gate == "branches":
            return LinearRouter(d_in, 1, 1, score="sigmoid", renormalize=False)
        return self.learning(LinearRouter(d_in, self.n_experts, self.k))

    def _bank(self, site: Site, rank: int) -> ExpertBank:
        family = Affine() if self.biases else self.family
        options = {**self.bank_options(), "rank": rank, "scaling": 1.0 if self.alpha is None else self.alpha / rank}
        return family.build(site, self.n_experts, site.shared.get("experts"), **options)
