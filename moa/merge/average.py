"""Merges that keep low-rank changes low-rank: spherical interpolation, model stock, averages of the factors.

SLERP (Shoemake 1985); Model Stock (arXiv 2403.19522); Poly (arXiv 2202.13914) and MHR-μ (arXiv 2211.03831).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank
from ..errors import ConfigError, ShapeError
from .compose import inner
from .subspace import total

# Below this cosine two ends are opposite: the direction of an arc between them is rounding, not data.
OPPOSITE = -0.9995


def slerp(deltas: Sequence[Delta], weights: Sequence[float], *, base: Tensor | None = None) -> Delta:
    """Return the point at share t of the great-circle arc between two changes.

    sin((1 - t)Ω)/sin Ω · ΔW_0 + sin(tΩ)/sin Ω · ΔW_1, cos Ω = ⟨ΔW_0, ΔW_1⟩ / (‖ΔW_0‖ ‖ΔW_1‖), t = w_1 / (w_0 + w_1).

    Args:
        deltas: two changes of one shape (o, i).
        weights: (2,) not negative, not both 0; [1 - t, t] for a share t.
        base: W (o, i); with it the arc runs between the full weights W + ΔW, as mergekit's `slerp` has it, and the
            result is the change from W.

    Returns:
        A new change: low-rank if both are and no base is given, else dense.

    Raises:
        ConfigError: not two deltas, or weights that give no share in [0, 1].
        ShapeError: the base's weight has another shape.

    Source: Shoemake 1985; mergekit's guide (slerp, nuslerp).
    Differs: the point is on the line, (1 - t) ΔW_0 + t ΔW_1, where no angle is determined: an end that is zero, a
        tensor of one entry, and ends that point in opposite directions (cos Ω < -0.9995), between which rounding
        would choose the arc. mergekit takes the line for cos Ω > 0.9995, too; there the arc is determined and is
        within 2e-4 of the line, and here it is the arc.
    """
    if len(deltas) != 2:
        raise ConfigError(f"slerp: it joins two adapters, got {len(deltas)}; use model_stock or average for more.")
    if min(weights) < 0 or sum(weights) == 0:
        raise ConfigError(f"slerp: weights are {list(weights)}, expected [1 - t, t] with t in [0, 1].")
    t = weights[1] / (weights[0] + weights[1])
    if base is not None:
        if base.shape != deltas[0].shape:
            raise ShapeError(f"slerp: base is {tuple(base.shape)}, the changes are {tuple(deltas[0].shape)}.")
        ends: list[Delta] = [Dense(base.to(d.dtype) + d.dense()) for d in deltas]
    else:
        ends = list(deltas)
    norms = [math.sqrt(inner(d, d)) for d in ends]
    c0, c1 = 1 - t, t  # the line: also the limit of the formula as Ω → 0
    if min(norms) > 0:  # a tensor of one entry has cosine 1 or -1
        cosine = min(1.0, inner(ends[0], ends[1]) / (norms[0] * norms[1]))
        angle = math.acos(cosine) if cosine >= OPPOSITE else 0.0
        if angle > 1e-6:
            c0 = math.sin((1 - t) * angle) / math.sin(angle)
            c1 = math.sin(t * angle) / math.sin(angle)
    result = total(ends, (c0, c1))
    return result if base is None else Dense(result.dense() - base.to(result.dtype))


def model_stock(deltas: Sequence[Delta]) -> Delta:
    """Return t · mean ΔW, the point nearest to the centre of the fine-tuned weights given only their angle.

    t = N cos θ / (1 + (N - 1) cos θ), cos θ the mean over pairs of ⟨ΔW_a, ΔW_b⟩ / (‖ΔW_a‖ ‖ΔW_b‖), per tensor.

    Args:
        deltas: N ≥ 2 changes of one shape (o, i).

    Returns:
        A new change, low-rank if all are. Zero changes have cosine 0 with every other.

    Raises:
        ConfigError: fewer than two.

    Source: Jang et al. 2024, arXiv 2403.19522 (the interpolation ratio).
    Differs: t is 1, so the result is the mean, where no such point exists: in a tensor of one entry, which has no
        angle, and where 1 + (N - 1) cos θ is 0 because the changes cancel. mergekit 0.1.5 keeps the base's value in
        the second case, and takes norms whose product is below 1e-6 as 1e-6.
    """
    n = len(deltas)
    if n < 2:
        raise ConfigError(f"model_stock: it needs at least two adapters, got {n}.")
    norms = [math.sqrt(inner(d, d)) for d in deltas]
    cosines = [
        inner(deltas[a], deltas[b]) / (norms[a] * norms[b]) if norms[a] * norms[b] > 0 else 0.0
        for a in range(n)
        for b in range(a + 1, n)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (n - 1) * cosine
    exists = deltas[0].shape.numel() > 1 and divisor >= 1e-6
    return total(deltas, (cosine / divisor if exists else 1 / n,) * n)


def average_factors(deltas: Sequence[Delta], weights: Sequence[float] | Tensor) -> LowRank:
    """Return (Σ w_t up_t)(Σ w_t down_t): the factors averaged, which is NOT the average of the changes.

    The product holds cross terms up_a down_b: 70-100 % away from Σ w_t ΔW_t on unrelated adapters. It is what Poly and
    MHR-μ compute, whose skills are trained for it; for adapters trained apart take `average`.

    Args:
        deltas: low-rank, equal ranks: down (r, i), up (o, r) with the scale.
        weights: (n,) one per adapter, or (H, n) one row per head: head h then weights columns h·i/H … of down and
            rows h·o/H … of up.

    Returns:
        Low-rank, rank r.

    Raises:
        ConfigError: a dense change, unequal ranks, or weights that do not match.
        ShapeError: i or o is not a multiple of the number of heads.

    Source: Ponti et al. 2022, arXiv 2202.13914 (Poly); Caccia et al. 2022, arXiv 2211.03831 (MHR, MHR-μ).
    """
    parts = [d for d in deltas if isinstance(d, LowRank)]
    ranks = [d.rank for d in parts]
    if len(parts) < len(deltas) or len(set(ranks)) > 1:
        what = "dense changes" if len(parts) < len(deltas) else f"ranks {ranks}"
        raise ConfigError(
            f"average_factors: it averages factors of one rank, got {what}; "
            "use average, which averages the changes themselves and takes any rank."
        )
    table = torch.as_tensor(weights, dtype=parts[0].dtype, device=parts[0].device)
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2 or table.shape[1] != len(parts):
        raise ConfigError(f"average_factors: weights are {tuple(table.shape)} for {len(parts)} adapters.")
    heads = table.shape[0]
    o, i = parts[0].shape
    if o % heads or i % heads:
        raise ShapeError(f"average_factors: {heads} heads do not divide the change ({o}, {i}).")
    down = sum(table[:, t].repeat_interleave(i // heads) * p.down for t, p in enumerate(parts))
    up = sum(table[:, t].repeat_interleave(o // heads)[:, None] * p.up for t, p in enumerate(parts))
    assert isinstance(down, Tensor)
    assert isinstance(up, Tensor)
    return LowRank(down, up)
