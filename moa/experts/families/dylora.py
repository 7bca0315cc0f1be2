"""LoRA experts of elastic rank: trained so that any b ≤ R of their components work. Valipour et al. 2022 (DyLoRA)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, low_rank
from ...errors import ConfigError
from ...kernels import grouped_linear, grouped_sum, has_slots
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..factored import FusedFactors
from ..family import Family, register_expert
from ..frozen import generator
from ..fused import Fused
from ..lora import LoRABank

Update = Literal["nested", "last"]
WIDTH = 8  # components come in multiples of it, those beyond b zero: kernels want such widths


class Elastic(nn.Module):
    """The rank that all experts of a recipe have now: drawn anew for each step of training, chosen for evaluation.

    Args:
        highest: R.
        seed: of the draws, the same in every process.

    Attributes:
        chosen: b in evaluation; None is R.
        drawn: b of this training step, uniform in 1 … R.
    """

    def __init__(self, highest: int, seed: int = 0) -> None:
        super().__init__()
        self.highest, self.seed, self.steps = highest, seed, 0
        self.chosen: int | None = None
        self.step()

    def step(self) -> None:
        """Draw the rank of the next training step; called after each optimizer step, so recomputed blocks agree."""
        draw = generator(self.seed, "rank", str(self.steps))
        self.drawn = int(torch.randint(1, self.highest + 1, (), generator=draw))
        self.steps += 1


class DyLoRABank(LoRABank):
    """E nested LoRAs: at rank b, E_e(x) = s R / b · (x down_e[:b]^T) up_e[:b], which is alpha / b with s = alpha / R.

    | parameter | shape | start |
    |---|---|---|
    | down (A) | (E, R, i) | uniform ±1/√i |
    | up (B, transposed) | (E, R, o) | zero |

    A routing with ranks says b of each row and slot; without, all rows have the rank of `Elastic`.

    Args:
        site: the layer.
        n_experts: E.
        elastic: the rank now.
        update: which components a step at rank b trains: "nested", all b of them, or "last", only the b-th.
        options: as in `ExpertBank`, rank R.

    Source: arXiv 2210.07558, algorithm 1.
    """

    def __init__(self, site: Site, n_experts: int, elastic: Elastic, update: Update = "nested", **options: Any) -> None:
        super().__init__(site.d_in, site.d_out, n_experts, **options)
        self.elastic, self.update = elastic, update

    @property
    def active(self) -> int:
        """b of rows whose routing has no ranks."""
        return self.elastic.drawn if self.training else self.elastic.chosen or self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return b components of down and up, (E, …) each, with gradients where a step trains them; R / b is in up."""
        down, up = (self._nested(factor) for factor in (self.down, self.up))
        return down, up if self.active == self.rank else up * (self.rank / self.active)

    def _nested(self, factor: Tensor) -> Tensor:
        b = self.active
        if b == self.rank and not (self.training and self.update == "last"):
            return factor
        width = min(self.rank, -(-b // WIDTH) * WIDTH)
        kept = factor[:, :b]
        if self.training and self.update == "last":
            kept = torch.cat([factor[:, : b - 1].detach(), factor[:, b - 1 : b]], 1)
        return F.pad(kept, (0, 0, 0, width - b))

    def delta(self, expert: int) -> Delta:
        """Return s R / b · up_e^T down_e, (o, i), of the rank b chosen for evaluation, as factors."""
        b = self.elastic.chosen or self.rank
        down, up = self.down[expert, :b].detach(), self.up[expert, :b].detach()
        return low_rank(down, up.T, self.scaling * self.rank / b)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i), each row at its own rank where the routing has ranks."""
        if routing.ranks is None:
            return super().forward(x, routing)
        x = F.dropout(x, self.dropout, self.training)
        engine = self.engine if has_slots(self.engine) else None
        kept = torch.arange(self.rank, device=x.device) < routing.ranks.unsqueeze(-1)  # (*rows, K, R)
        weights = routing.weights * (self.scaling * self.rank / routing.ranks)  # (*rows, K)
        if routing.indices is None:
            hidden = F.linear(x, self.down.flatten(0, 1).to(x.dtype)).unflatten(-1, (self.n_experts, self.rank))
            spread = torch.where(kept, hidden * weights.to(hidden.dtype).unsqueeze(-1), 0)  # (*rows, E, R)
            return spread.flatten(-2) @ self.up.flatten(0, 1).to(spread.dtype)
        indices = routing.indices.expand(*x.shape[:-1], routing.k)
        hidden = grouped_linear(x, self.down, indices, engine=engine)  # (*rows, K, R)
        spread = torch.where(kept, hidden * weights.to(hidden.dtype).unsqueeze(-1), 0)
        return grouped_sum(spread, self.up, indices, engine=engine)

    @property
    def fused(self) -> FusedElastic:
        """The kernels', which know one rank for all rows (*rows, i), or the parts one after the other."""
        return FusedElastic(self)


class FusedElastic(FusedFactors):
    """The kernels on rows (*rows, i), but for rows with ranks of their own."""

    __slots__ = ()

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b + Σ_e w_e E_e(x), (*rows, o)."""
        run = super().add_linear if routing.ranks is None else functools.partial(Fused.add_linear, self)
        return run(x, routing, weight, bias)


@register_expert("dylora", "Valipour et al. 2022, arXiv 2210.07558")
@dataclass(frozen=True, kw_only=True)
class DyLoRA(Family):
    """LoRA whose leading b components work by themselves, for every b up to the rank R.

    `moa.model.elastic` chooses b for a model, a block of code or each request; the recipe topk with ranks lets its gate
    choose one for each row.

    Args:
        update: which components a training step at a drawn rank b trains: "nested", all b, or "last", only the b-th.
        seed: of the ranks drawn, one for each optimizer step.

    Raises:
        ConfigError: an unknown update.
    Source: arXiv 2210.07558, algorithm 1.
    Differs: the code released draws a rank at every forward, of which a recomputed block would see another; here it
        stays for all forwards of an optimizer step.
    """

    elastic = True

    update: Update = "nested"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.update not in ("nested", "last"):
            raise ConfigError(f"update must be 'nested' or 'last', got {self.update!r}.")

    def shared(self, sites: Sequence[Site], **options: Any) -> nn.Module:
        """Return the rank that all layers have now; no tensors, so no shapes."""
        return Elastic(options["rank"], self.seed)

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with down (E, R, i) and up (E, R, o)."""
        elastic = shared if isinstance(shared, Elastic) else Elastic(options["rank"], self.seed)
        return DyLoRABank(site, n_experts, elastic, self.update, **options)
