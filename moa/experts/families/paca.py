"""Column experts: a few of a weight's input columns are trained. Woo et al. 2025 (PaCA), arXiv 2503.01905."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...delta import Delta, LowRank, Sparse, Undo, low_rank
from ...errors import ConfigError
from ...kernels import grouped_sum, has_slots
from ...layers import Site
from ...types import Routing
from ..bank import ExpertBank
from ..family import Family, register_expert
from ..frozen import generator


@dataclass(frozen=True, eq=False)
class Columns(LowRank):
    """A change of a few columns: written into a weight it keeps, for the way back, only those.

    Args:
        down: (r, i) one-hot rows.
        up: (o, r) what is added to each column.
        columns: (r,) int64.
    """

    columns: Tensor

    def write_into(self, weight: Tensor) -> Undo:
        """Add the columns (o, r) to a weight (o, i) in place; their old values are kept for the way back."""
        o, i = self.shape
        places = torch.arange(o, device=self.columns.device).unsqueeze(1) * i + self.columns  # (o, r)
        return Sparse(places.flatten(), self.up.flatten(), self.shape).write_into(weight)


class PaCABank(ExpertBank):
    """E sets of r columns of the weight: E_e(x) = s · x_S up_e with x_S the r inputs that columns_e names.

    | tensor | shape | start |
    |---|---|---|
    | up (transposed) | (E, r, o) | zero |
    | columns (S) | (E, r) int64 | distinct, drawn from the seed, never trained |

    It is W x with the columns W[:, S] + s · up^T in the place of W[:, S]: a gather of r inputs and a thin product, and
    those inputs are all of x that is kept for the backward pass.

    Args:
        d_in: i.
        d_out: o.
        columns: (E, r).
        options: rank, scaling, dropout and engine as in `ExpertBank`.

    Source: arXiv 2503.01905, §3.2.
    Differs: the paper trains the columns themselves, stored over s, which returns them with a rounding error of
        (1 / s) · s; here what is added to them is trained, so that several experts can stand on one weight.
    """

    equal_at_init = False
    per_expert: ClassVar[tuple[str, ...]] = ("up", "columns")
    averages: ClassVar[bool] = True

    columns: Tensor

    def __init__(self, d_in: int, d_out: int, columns: Tensor, **options: Any) -> None:
        super().__init__(d_in, d_out, len(columns), **{**options, "rank": columns.shape[1]})
        self.register_buffer("columns", columns, persistent=False)
        self.up = nn.Parameter(torch.zeros(self.n_experts, self.rank, d_out))

    def reset_parameters(self) -> None:
        """Set up (E, r, o) to zero; the columns stay."""
        nn.init.zeros_(self.up)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return s · x_S up_e, (*rows, o), of x (*rows, i)."""
        return x[..., self.columns[expert]] @ self.up[expert].to(x.dtype) * self.scaling

    def delta(self, expert: int) -> Delta:
        """Return the change (o, i) of its columns, as factors."""
        columns = self.columns[expert]
        down = F.one_hot(columns, self.d_in).to(self.up.dtype)  # (r, i)
        change = low_rank(down, self.up[expert].detach().T, self.scaling)
        return Columns(change.down, change.up, columns)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return down (E, r, i), one-hot, and up (E, r, o)."""
        return F.one_hot(self.columns, self.d_in).to(self.up.dtype), self.up

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e E_e(x), (*rows, o), of x (*rows, i)."""
        x = F.dropout(x, self.dropout, self.training)
        if routing.indices is None or not has_slots(self.engine):
            hidden = x.index_select(-1, self.columns.flatten()).unflatten(-1, self.columns.shape)  # (*rows, E, r)
            weights = (routing.dense() * self.scaling).to(hidden.dtype).unsqueeze(-1)  # (*rows, E, 1)
            spread = torch.where(weights != 0, hidden * weights, 0).flatten(-2)  # (*rows, E r)
            return spread @ self.up.flatten(0, 1).to(spread.dtype)
        indices = routing.indices.expand(*x.shape[:-1], routing.k)
        flat, chosen = x.reshape(-1, self.d_in), self.columns[indices].reshape(-1, routing.k * self.rank)  # (T, K r)
        rows = torch.arange(len(flat), device=x.device).unsqueeze(1)
        hidden = flat[rows, chosen].view(*indices.shape, self.rank)  # (*rows, K, r); a gather would keep all of x
        weights = (routing.weights * self.scaling).to(hidden.dtype).unsqueeze(-1)
        return grouped_sum(hidden * weights, self.up, indices, engine=self.engine)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


@register_expert("paca", "Woo et al. 2025, arXiv 2503.01905")
@dataclass(frozen=True, kw_only=True)
class PaCA(Family):
    """r columns of the weight, chosen at random: a LoRA whose first product is a gather.

    `moa.training.in_place.in_place` trains a single expert in the base's own weight, without a second product.

    Args:
        seed: of the columns; every layer and expert draws its own.
    """

    places = ("input",)
    usual_scale = 1.0

    seed: int = 0

    def build(self, site: Site, n_experts: int, shared: nn.Module | None, **options: Any) -> ExpertBank:
        """Return a fresh bank with up (E, r, o) and columns (E, r).

        Raises:
            ConfigError: more columns than the weight has.
        """
        rank = options["rank"]
        if rank > site.d_in:
            raise ConfigError(
                f"{site.name}: rank={rank} columns of a weight ({site.d_out}, {site.d_in}) that has {site.d_in}."
            )
        draw = generator(self.seed, site.name)
        columns = torch.stack([torch.randperm(site.d_in, generator=draw)[:rank] for _ in range(n_experts)])
        return PaCABank(site.d_in, site.d_out, columns, **options)
