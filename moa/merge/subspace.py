"""Merging in the singular subspaces of the changes, and keeping a change out of given subspaces.

KnOTS (arXiv 2410.19735), task singular vectors (arXiv 2412.00081), isotropic merging (arXiv 2502.04959),
complementary-subspace LoRA (projection away from the base's principal subspace).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank
from ..errors import ConfigError, ShapeError, unknown_name
from ..spectrum import numerical_rank
from .compose import stack, thin_svd
from .consensus import weighted_sum


def is_matrix(shape: Sequence[int], n: int) -> bool:
    """Return whether n changes of a shape, e.g. (o, i), are matrices with entries, which have singular vectors."""
    return len(shape) == 2 and min(shape) > 0


def has_room(shape: Sequence[int], n: int) -> bool:
    """Return whether every one of n changes of a shape, e.g. (o, i), can have a direction of its own."""
    return len(shape) == 2 and min(shape) >= n


def total(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """Return Σ_t w_t ΔW_t (o, i): stacked factors if every change is low-rank, else one dense sum.

    Raises:
        ConfigError: weights that do not match.
        ShapeError: the deltas change weights of different shapes.
    """
    if all(isinstance(d, LowRank) for d in deltas):
        return stack(deltas, weights)
    return Dense(weighted_sum((d.dense() for d in deltas), weights))


def aligned(deltas: Sequence[Delta]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the shared basis of several changes and each one's share of it: [ΔW_1 … ΔW_n] = U Σ [V_1ᵀ … V_nᵀ].

    Low-rank changes go through QR of their factors; the (o, n·i) matrix is then never formed.

    Args:
        deltas: each (o, i).

    Returns:
        U (o, q), σ (q,), and n blocks V_tᵀ (q, i); q is the numerical rank of the concatenation.

    Raises:
        ShapeError: the changes are not matrices of one shape.

    Source: Stoica et al. 2024, arXiv 2410.19735 (shared singular basis).
    """
    if len({tuple(d.shape) for d in deltas}) != 1 or len(deltas[0].shape) != 2:
        raise ShapeError(f"aligned: expected matrices of one shape, got {[tuple(d.shape) for d in deltas]}.")
    o, i = deltas[0].shape
    n = len(deltas)
    parts = [d for d in deltas if isinstance(d, LowRank)]
    if len(parts) < n or sum(p.rank for p in parts) >= o:
        u, s, vt = torch.linalg.svd(torch.cat([d.dense() for d in deltas], dim=1), full_matrices=False)
        blocks = list(vt.split(i, dim=1))
    else:
        # The right factor is block-diagonal, so its QR is each block's own.
        q_up, r_up = torch.linalg.qr(torch.cat([p.up for p in parts], dim=1))
        q_down, r_down = zip(*(torch.linalg.qr(p.down.T) for p in parts), strict=True)
        u, s, core = torch.linalg.svd(r_up @ torch.block_diag(*(r.T for r in r_down)), full_matrices=False)
        u = q_up @ u
        blocks = [c @ q.T for c, q in zip(core.split([q.shape[1] for q in q_down], dim=1), q_down, strict=True)]
    k = numerical_rank(s, (o, n * i))
    return u[:, :k], s[:k], [b[:k] for b in blocks]


def knots(deltas: Sequence[Delta], combine: Callable[[Sequence[Tensor]], Tensor], *, share: str = "scaled") -> LowRank:
    """Return the changes merged in their shared singular basis: ΔW = U · combine(ΣV_1ᵀ, …, ΣV_nᵀ).

    Args:
        deltas: each (o, i).
        combine: merges n tensors (q, i) into one, e.g. TIES.
        share: what is combined: "scaled" Σ V_tᵀ, or "plain" V_tᵀ with Σ put back after.

    Returns:
        Low-rank: up U (o, q), down (q, i).

    Raises:
        ShapeError: the changes are not matrices of one shape.
        ConfigError: an unknown share.

    Source: Stoica et al. 2024, arXiv 2410.19735.
    Differs: the paper combines V_t ("plain"); its released code puts the singular values on V_t first ("scaled",
        `s_on_V`) in every configuration of its tables, and so do we by default. Their code ranks entries over the
        whole model, here each tensor is combined by itself.
    """
    if share not in ("scaled", "plain"):
        raise ConfigError(unknown_name("share", share, ("scaled", "plain"), "knots"))
    u, s, blocks = aligned(deltas)
    if share == "scaled":
        return LowRank(combine([s[:, None] * b for b in blocks]), u)
    return LowRank(s[:, None] * combine(blocks), u)


def partial_isometry(matrix: Tensor) -> Tensor:
    """Return the nearest matrix (a, b) with orthonormal rows or columns: P Qᵀ of the SVD P D Qᵀ.

    Args:
        matrix: (a, b).

    Returns:
        (a, b). Directions in which the matrix is numerically zero stay zero: there the nearest is not unique.
    """
    if matrix.numel() == 0:
        return matrix
    p, d, qt = torch.linalg.svd(matrix, full_matrices=False)
    k = numerical_rank(d, matrix.shape)
    return p[:, :k] @ qt[:k]


def task_singular_vectors(deltas: Sequence[Delta], weights: Sequence[float], *, rank: int | None = None) -> LowRank:
    """Return Û Σ V̂ᵀ: each task's top singular triplets side by side, their vectors made orthogonal across tasks.

    U = [U_1 … U_T], Σ = diag(w_1 Σ_1, …), V = [V_1 … V_T], each task truncated to k; Û = P Qᵀ of U = P D Qᵀ, V̂ alike.

    Args:
        deltas: each (o, i).
        weights: (T,) one per task.
        rank: k per task; ⌊min(o, i) / T⌋ if None.

    Returns:
        Low-rank, rank Σ_t min(k, rank of ΔW_t).

    Raises:
        ConfigError: k is below 1 or the k's do not fit into min(o, i).
        ShapeError: a change is not a matrix.

    Source: Gargiulo et al. 2024, arXiv 2412.00081, Algorithm 1 (TSV-Merge).
    Differs: where tasks share directions exactly (equal adapters, or one shared down factor) U or V loses rank and
        the paper's orthogonalisation is not unique; the lost directions are then left out instead of being filled
        with arbitrary ones. A matrix with min(o, i) < T leaves no task a direction of its own (the released code
        would keep none and write no change): `merge` averages it, as it does what is not a matrix.
    """
    if len(deltas[0].shape) != 2:
        raise ShapeError(f"tsv: expected matrices, got shape {tuple(deltas[0].shape)}.")
    o, i = deltas[0].shape
    k = min(o, i) // len(deltas) if rank is None else rank
    if k < 1 or k * len(deltas) > min(o, i):
        raise ConfigError(
            f"tsv: {len(deltas)} tasks of rank {k} do not fit into a {o} × {i} matrix; the rank per task must be "
            f"from 1 to {min(o, i) // len(deltas)}."
        )
    us, ss, vs = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vt = thin_svd(delta)
        kept = min(k, numerical_rank(s, delta.shape))
        us.append(u[:, :kept])
        ss.append(weight * s[:kept])
        vs.append(vt[:kept])
    u_white = partial_isometry(torch.cat(us, dim=1))
    v_white = partial_isometry(torch.cat(vs, dim=0))
    return LowRank(v_white, u_white * torch.cat(ss))


def isotropic(deltas: Sequence[Delta], weights: Sequence[float]) -> LowRank:
    """Return σ̄ U Vᵀ: the weighted sum of the changes with every singular value replaced by their mean.

    Args:
        deltas: each (o, i).
        weights: (T,) one per task.

    Returns:
        Low-rank, of the sum's numerical rank q.

    Raises:
        ShapeError: a change is not a matrix.
        ConfigError: weights that do not match.

    Source: Marczak et al. 2025, arXiv 2502.04959 (ISO-C).
    Differs: the mean runs over the q singular values that are not zero. The paper's changes have full rank, where
        this is the same; for low-rank ones its formula would divide by min(o, i) and spread the rest over directions
        that are not determined.
    """
    u, s, vt = thin_svd(total(deltas, weights))
    k = numerical_rank(s, deltas[0].shape)
    mean = s[:k].mean() if k else s.new_zeros(())
    return LowRank(vt[:k].contiguous(), u[:, :k] * mean)


def project_out(
    delta: Delta, *, left: Tensor | None = None, right: Tensor | None = None, tolerance: float = 1e-4
) -> Delta:
    """Return (I - L Lᵀ) ΔW (I - R Rᵀ): the change kept out of given output and input directions.

    Args:
        delta: (o, i).
        left: L (o, k) with orthonormal columns; None projects no outputs.
        right: R (i, k) with orthonormal columns; None projects no inputs.
        tolerance: largest allowed entry of |LᵀL - I|.

    Returns:
        A new delta of the same form; a low-rank one keeps its rank.

    Raises:
        ShapeError: a basis does not fit the change.
        ConfigError: a basis is not orthonormal.

    Source: complementary-subspace LoRA (abstract only was available; one- or two-sided was not stated).
    """
    up = delta.up if isinstance(delta, LowRank) else delta.dense()
    down = delta.down if isinstance(delta, LowRank) else None
    for name, basis, size in (("left", left, delta.shape[0]), ("right", right, delta.shape[1])):
        if basis is None:
            continue
        if basis.ndim != 2 or basis.shape[0] != size:
            raise ShapeError(f"project_out: {name} is {tuple(basis.shape)}, expected ({size}, k) for this change.")
        gap = basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
        if gap.numel() and float(gap.abs().max()) > tolerance:
            raise ConfigError(
                f"project_out: the columns of {name} are not orthonormal (off by {float(gap.abs().max()):.2g}); "
                "take them from a QR or a singular value decomposition."
            )
    if left is not None:
        basis = left.to(up)
        up = up - basis @ (basis.T @ up)
    if right is not None:
        basis = right.to(up)
        if down is not None:
            down = down - (down @ basis) @ basis.T
        else:
            up = up - (up @ basis) @ basis.T
    return Dense(up) if down is None else LowRank(down, up)


def principal_subspace(weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top-k left and right singular vectors of a weight, for `project_out`.

    Args:
        weight: W (o, i).
        k: 1 … min(o, i).

    Returns:
        L (o, k) and R (i, k), orthonormal columns.

    Raises:
        ConfigError: k is out of range.
        ShapeError: the weight is not a matrix.
    """
    if weight.ndim != 2:
        raise ShapeError(f"principal_subspace: expected a matrix (o, i), got {tuple(weight.shape)}.")
    if not 1 <= k <= min(weight.shape):
        raise ConfigError(f"principal_subspace: k is {k}, expected 1 … {min(weight.shape)}.")
    u, _, vt = thin_svd(Dense(weight if weight.dtype == torch.float64 else weight.float()))
    return u[:, :k], vt[:k].T
