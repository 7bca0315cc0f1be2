"""Exact composition of low-rank changes, and their best approximation at a given rank with its error.

Stacking: FLoRA (arXiv 2409.05976). Squeezing: LoRA-Squeeze; Eckart and Young 1936; randomised SVD (arXiv 0909.4061).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import Delta, LowRank
from ..errors import ConfigError, ShapeError, unknown_name
from ..spectrum import numerical_rank, rank_for_energy


def check_weights(weights: Sequence[float] | None, n: int, where: str) -> tuple[float, ...]:
    """Return one finite number per adapter; ones where none were given.

    Raises:
        ConfigError: another number of weights than adapters, or a weight that is not a finite number.
    """
    if weights is None:
        return (1.0,) * n
    values = tuple(float(w) for w in weights)
    if len(values) != n:
        raise ConfigError(f"{where}: {len(values)} weights for {n} adapters; give one per adapter, in their order.")
    if not all(math.isfinite(v) for v in values):
        raise ConfigError(f"{where}: weights are {list(values)}; expected finite numbers.")
    return values


def normalised(weights: Sequence[float], where: str) -> tuple[float, ...]:
    """Return (n,) weights divided by their sum.

    Raises:
        ConfigError: the sum is 0.
    """
    if abs(sum(weights)) < 1e-12:
        raise ConfigError(
            f"{where}: the weights {list(weights)} sum to 0, so they do not form an average; use task_arithmetic."
        )
    return tuple(w / sum(weights) for w in weights)


def stack(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> LowRank:
    """Return Σ_t w_t ΔW_t as one low-rank change, exactly, for any ranks: rank Σ r_t.

    down = [down_1; …; down_n], up = [w_1 up_1, …, w_n up_n]; each delta's own scale is already in its `up`, so unequal
    alpha / r are right, and the order of the deltas changes nothing but the order of the sum.

    Args:
        deltas: low-rank, down (r_t, i) and up (o, r_t).
        weights: (n,) numbers; ones if None.

    Returns:
        New factors, down (Σ r_t, i) and up (o, Σ r_t), in the widest type of the inputs.

    Raises:
        ConfigError: no deltas, a dense one, or weights that do not match.
        ShapeError: the deltas change weights of different shapes.

    Source: Wang et al. 2024, arXiv 2409.05976 (FLoRA), stacking-based aggregation.
    Differs: the released code stores one alpha for the stack, which is right only if every alpha / r is equal.
    """
    if not deltas:
        raise ConfigError("stack: no deltas given.")
    values = check_weights(weights, len(deltas), "stack")
    shapes = {tuple(d.shape) for d in deltas}
    if len(shapes) > 1:
        raise ShapeError(f"stack: the deltas have different shapes {sorted(shapes)}: they change different weights.")
    parts: list[LowRank] = []
    for position, delta in enumerate(deltas):
        if not isinstance(delta, LowRank):
            raise ConfigError(
                f"stack: delta {position} {tuple(delta.shape)} is dense, and a stack joins factors: squeeze it to a "
                "rank first, or use task arithmetic, which sums dense changes."
            )
        parts.append(delta)
    dtype = parts[0].dtype
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    down = torch.cat([p.down.to(dtype) for p in parts], dim=0)
    up = torch.cat([p.up.to(dtype) if w == 1 else p.up.to(dtype) * w for p, w in zip(parts, values, strict=True)], 1)
    return LowRank(down, up)


def thin_svd(delta: Delta) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of a change, through its factors where it is low-rank.

    QR of up and of downᵀ, then the SVD of the small core R_up R_downᵀ (r, r); nothing of size (o, i) is formed.

    Args:
        delta: (o, i).

    Returns:
        U (o, q), singular values (q,) descending, Vᵀ (q, i); q = min(r, o, i), or min(o, i) when dense.

    Raises:
        ShapeError: the change is not a matrix.
    """
    if len(delta.shape) != 2:
        raise ShapeError(f"a singular value decomposition needs a matrix, got shape {tuple(delta.shape)}.")
    if not isinstance(delta, LowRank) or delta.rank >= min(delta.shape):
        u, s, vt = torch.linalg.svd(delta.dense(), full_matrices=False)
        return u, s, vt
    q_up, r_up = torch.linalg.qr(delta.up)
    q_down, r_down = torch.linalg.qr(delta.down.T)
    u, s, vt = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return q_up @ u, s, vt @ q_down.T


@dataclass(frozen=True, eq=False)
class Squeezed:
    """A change at a lower rank, and how far it is from the one it came from.

    Args:
        delta: the result, down (k, i) and up (o, k), each with √σ of the singular values.
        error: ‖ΔW - result‖_F, measured.
        optimal: √(Σ_{j>k} σ_j²), the least error any rank-k change has; None where it was not computed (a dense
            change by the randomised method).
        norm: ‖ΔW‖_F.
    """

    delta: LowRank
    error: float
    optimal: float | None
    norm: float

    @property
    def relative(self) -> float:
        """error / norm; 0 for a zero change."""
        return self.error / self.norm if self.norm else 0.0


def squeeze(
    delta: Delta,
    rank: int | None = None,
    *,
    energy: float | None = None,
    method: str = "exact",
    oversample: int = 8,
    power: int = 2,
    seed: int = 0,
) -> Squeezed:
    """Return the change at a lower rank: the nearest one in Frobenius norm, or a randomised approximation of it.

    exact: ΔW = U Σ Vᵀ (QR of the factors, SVD of the core), up = U_k √Σ_k, down = √Σ_k V_kᵀ.
    randomized: Q = orth((ΔW ΔWᵀ)^power ΔW Ω), Ω (i, k + oversample) normal; then the SVD of Qᵀ ΔW, truncated.

    Args:
        delta: (o, i), low-rank or dense.
        rank: k ≥ 1; the numerical rank if it is lower (the result is then lossless).
        energy: instead of a rank, the share of ‖ΔW‖² to keep, (0, 1].
        method: "exact" or "randomized".
        oversample: extra columns of the random projection.
        power: power iterations; each sharpens the spectrum.
        seed: of the random projection.

    Returns:
        `Squeezed`: new factors, their error, and the optimal error at that rank.

    Raises:
        ConfigError: neither or both of rank and energy, a rank below 1, an unknown method, or energy with the
            randomised method.
        ShapeError: the change is not a matrix.

    Source: Eckart and Young 1936; Halko et al. 2009, arXiv 0909.4061, Algorithms 4.3 and 5.1; LoRA-Squeeze's
        post-hoc form.
    Differs: alpha is re-baked: the result's scale is 1.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"squeeze: give rank or energy, one of them; got rank={rank} and energy={energy}.")
    if method not in ("exact", "randomized"):
        raise ConfigError(unknown_name("method", method, ("exact", "randomized"), "squeeze"))
    if rank is not None and rank < 1:
        raise ConfigError(f"squeeze: rank is {rank}, expected at least 1.")
    if method == "randomized" and rank is None:
        raise ConfigError("squeeze: the randomised method needs a rank; energy asks for all singular values.")
    if method == "randomized" and not isinstance(delta, LowRank):
        # The optimal error would need the full decomposition that the randomised method is there to avoid.
        small = _randomized(delta, rank or 0, oversample, power, seed)
        return Squeezed(small, _distance(delta, small), None, float(delta.dense().double().norm()))
    u, s, vt = thin_svd(delta)
    k = rank_for_energy(s, energy) if energy is not None else min(rank or 0, numerical_rank(s, delta.shape))
    squares = s.double().square()
    norm, optimal = float(squares.sum().sqrt()), float(squares[k:].sum().sqrt())
    exact = method == "exact"
    small = _balanced(u[:, :k], s[:k], vt[:k]) if exact else _randomized(delta, k, oversample, power, seed)
    return Squeezed(small, _distance(delta, small), optimal, norm)


def _distance(delta: Delta, small: LowRank) -> float:
    """Return ‖ΔW - small‖_F as measured, through the factors where both are low-rank."""
    if isinstance(delta, LowRank):
        return float(thin_svd(stack([delta, small], [1.0, -1.0]))[1].double().norm())
    return float((delta.dense().double() - small.up.double() @ small.down.double()).norm())


def _balanced(u: Tensor, s: Tensor, vt: Tensor) -> LowRank:
    """Return up = U √Σ and down = √Σ Vᵀ."""
    root = s.sqrt()
    return LowRank((root[:, None] * vt).contiguous(), (u * root).contiguous())


def _randomized(delta: Delta, k: int, oversample: int, power: int, seed: int) -> LowRank:
    def left(x: Tensor) -> Tensor:  # ΔW x
        return delta.up @ (delta.down @ x) if isinstance(delta, LowRank) else delta.dense() @ x

    def right(x: Tensor) -> Tensor:  # ΔWᵀ x
        return delta.down.T @ (delta.up.T @ x) if isinstance(delta, LowRank) else delta.dense().T @ x

    o, i = delta.shape
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(i, min(k + oversample, o, i), generator=generator, dtype=delta.dtype).to(delta.device)
    basis = torch.linalg.qr(left(omega))[0]
    for _ in range(power):
        basis = torch.linalg.qr(right(basis))[0]
        basis = torch.linalg.qr(left(basis))[0]
    u, s, vt = torch.linalg.svd(right(basis).T, full_matrices=False)
    return _balanced(basis @ u[:, :k], s[:k], vt[:k])


def inner(a: Delta, b: Delta) -> float:
    """Return the inner product of two changes, Σ ΔW_a ⊙ ΔW_b, without making low-rank ones dense.

    Σ (up_a down_a) ⊙ (up_b down_b) = Σ (up_aᵀ up_b) ⊙ (down_a down_bᵀ).

    Args:
        a: (o, i).
        b: the same shape.

    Returns:
        A Python float, summed in float64.
    """
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.up.double().T @ b.up.double()
        right = a.down.double() @ b.down.double().T
        return float((left * right).sum())
    return float(torch.dot(a.dense().reshape(-1).double(), b.dense().reshape(-1).double()))
