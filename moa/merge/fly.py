"""Merging FlyLoRA adapters: exactly, each task keeping its own top-k; or densely, dropping the top-k.

FlyLoRA (arXiv 2510.08396).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import Delta, LowRank
from ..errors import ConfigError, ShapeError, unknown_name
from .compose import check_weights

SELECT = ("magnitude", "signed")


@dataclass(frozen=True, eq=False)
class FlyStack:
    """Several FlyLoRA adapters of one layer, kept apart: not a linear map, so it folds into no weight.

    f(x) = Σ_t up_t (m_t ⊙ down_t x), m_t the top-k of task t's own ranks.

    Args:
        down: (T, r, i) each task's frozen projection.
        up: (T, o, r) with the scale and the task's weight.
        bias: (T, r) each task's selection bias d; used to choose, never in the value.
        k: active ranks per task.
        select: "magnitude" chooses by |y| + d, "signed" by y + d.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    k: int
    select: str = "magnitude"

    def __call__(self, x: Tensor) -> Tensor:
        """Return the sum of the tasks' outputs (*rows, o) for x (*rows, i)."""
        y = torch.einsum("tri,...i->...tr", self.down.to(x), x)
        score = (y.abs() if self.select == "magnitude" else y) + self.bias.to(y)
        chosen = torch.zeros_like(y, dtype=torch.bool).scatter(-1, score.topk(self.k, dim=-1).indices, True)
        return torch.einsum("tor,...tr->...o", self.up.to(x), torch.where(chosen, y, 0.0))


def fly_stack(
    deltas: Sequence[Delta],
    k: int,
    weights: Sequence[float] | None = None,
    *,
    biases: Sequence[Tensor] | None = None,
    select: str = "magnitude",
) -> FlyStack:
    """Return FlyLoRA adapters rank-stacked with each task's own top-k: exactly Σ_t w_t f_t(x).

    Args:
        deltas: T low-rank changes of one rank: the frozen down (r, i) and the trained up (o, r) with alpha / r.
        k: active ranks per task, 1 … r.
        weights: (T,) one per task; 1/T each if None, the paper's average.
        biases: T selection biases (r,); zeros if None.
        select: "magnitude" (|y| + d) or "signed" (y + d, the paper's eq. 10).

    Returns:
        `FlyStack`.

    Raises:
        ConfigError: a dense change, unequal ranks, k out of range, weights or biases that do not match.
        ShapeError: the deltas change weights of different shapes.

    Source: Zou et al. 2025, arXiv 2510.08396, eq. 10 (selection) and 12 (merge).
    Differs: the paper does not say whether the top-k holds after its merge; its released merge averages factors and
        drops it. Here the two are apart: this one keeps it and is exact, the method `flylora_dense` drops it.
    """
    parts = _equal_ranks(deltas, "fly_stack")
    values = (1 / len(parts),) * len(parts) if weights is None else check_weights(weights, len(parts), "fly_stack")
    rank = parts[0].rank
    if not 1 <= k <= rank:
        raise ConfigError(f"fly_stack: k is {k}, expected 1 … {rank} (the rank).")
    if select not in SELECT:
        raise ConfigError(unknown_name("select", select, SELECT, "fly_stack"))
    if biases is not None and [tuple(b.shape) for b in biases] != [(rank,)] * len(parts):
        raise ConfigError(
            f"fly_stack: biases are {[tuple(b.shape) for b in biases]}; expected {len(parts)} of shape ({rank},)."
        )
    down = torch.stack([p.down for p in parts])
    up = torch.stack([p.up * w for p, w in zip(parts, values, strict=True)])
    bias = torch.stack(list(biases)).to(down) if biases is not None else torch.zeros_like(down[:, :, 0])
    return FlyStack(down, up, bias, k, select)


def fly_shared(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> LowRank:
    """Return FlyLoRA adapters with one shared frozen down factor merged into one: up = Σ_t w_t up_t, the same down.

    Every task then selects the same ranks for an x, so the result, run with the same top-k and bias, is exactly
    Σ_t w_t f_t(x); without top-k it is the average of the changes. Rank r, no growth.

    Args:
        deltas: T low-rank changes with the same down (r, i), bit for bit; up (o, r).
        weights: (T,) one per task; 1/T each if None.

    Returns:
        Low-rank: the shared down, not copied, and a new up.

    Raises:
        ConfigError: the down factors differ, a dense change, unequal ranks, or weights that do not match.
        ShapeError: the deltas change weights of different shapes.

    Source: Zou et al. 2025, arXiv 2510.08396, eq. 12, in the case the released scripts produce (one seed for all).
    """
    parts = _equal_ranks(deltas, "fly_shared")
    values = (1 / len(parts),) * len(parts) if weights is None else check_weights(weights, len(parts), "fly_shared")
    for position, part in enumerate(parts):
        if not torch.equal(part.down, parts[0].down):
            raise ConfigError(
                f"fly_shared: the frozen down factor of adapter {position} is not adapter 0's (another seed?): use "
                "fly_stack, which is exact with independent factors, or flylora_dense, which drops the top-k."
            )
    up = torch.stack([p.up * w for p, w in zip(parts, values, strict=True)]).sum(0)
    return LowRank(parts[0].down, up)


def shares_down(deltas: Sequence[Delta]) -> bool:
    """Return whether all changes are low-rank with the same down factor (r, i), bit for bit."""
    parts = [d for d in deltas if isinstance(d, LowRank)]
    return len(parts) == len(deltas) and all(torch.equal(p.down, parts[0].down) for p in parts)


def _equal_ranks(deltas: Sequence[Delta], where: str) -> list[LowRank]:
    parts = [d for d in deltas if isinstance(d, LowRank)]
    if not parts or len(parts) < len(deltas):
        raise ConfigError(f"{where}: expected low-rank changes, got {len(deltas) - len(parts)} dense of {len(deltas)}.")
    if len({p.rank for p in parts}) > 1:
        raise ConfigError(f"{where}: the adapters have ranks {[p.rank for p in parts]}; they must be equal.")
    if len({tuple(p.shape) for p in parts}) > 1:
        raise ShapeError(f"{where}: the changes have shapes {sorted({tuple(p.shape) for p in parts})}.")
    return parts
