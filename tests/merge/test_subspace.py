"""KnOTS, task singular vectors, isotropic merging, projections: from dense definitions in numpy's order of steps.

pytest tests/merge/test_subspace.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moa.errors import ConfigError, ShapeError
from moa.merge import Delta, Dense, LowRank, isotropic, knots, principal_subspace, project_out, task_singular_vectors
from moa.merge.consensus import agreeing_sum
from moa.merge.sparsify import keep_largest
from moa.merge.subspace import aligned, partial_isometry

from .tools import assert_close, factors, matrices


def dense(deltas: Sequence[LowRank]) -> list[Delta]:
    return [Dense(d.dense()) for d in deltas]


def tasks(n: int = 3, rank: int = 2) -> list[LowRank]:
    return [factors(rank, 14, 9, seed=t) for t in range(n)]


def ties(parts: Sequence[Tensor]) -> Tensor:
    return agreeing_sum(lambda: [keep_largest(p, 0.5) for p in parts], [1.0] * len(parts), "paper")


@pytest.mark.parametrize("rank", [2, 6], ids=["factors", "too many ranks"])
def test_the_shared_basis_rebuilds_every_change(rank: int) -> None:
    deltas = tasks(rank=rank)
    u, s, blocks = aligned(deltas)
    for d, b in zip(deltas, blocks, strict=True):
        assert_close(u @ s.diag() @ b, d.dense(), 1e-12)
    assert_close(s, torch.linalg.svdvals(torch.cat([d.dense() for d in deltas], 1))[: len(s)], 1e-12)
    vt = torch.cat(blocks, 1)
    assert_close(vt @ vt.T, torch.eye(len(s), dtype=torch.float64), 1e-11)


@pytest.mark.parametrize("share", ["scaled", "plain"])
def test_knots_from_the_definition(share: str) -> None:
    deltas = tasks()
    u, s, vt = torch.linalg.svd(torch.cat([d.dense() for d in deltas], 1), full_matrices=False)
    q = int((s > 1e-10).sum())
    u, s, vt = u[:, :q], s[:q], vt[:q]
    parts = list((s.diag() @ vt if share == "scaled" else vt).split(9, dim=1))
    merged = ties(parts)
    expected = u @ merged if share == "scaled" else u @ s.diag() @ merged
    # a singular pair's sign is free; TIES flips with it, so the merge does not
    assert_close(knots(deltas, ties, share=share).dense(), expected, 1e-10)
    assert_close(knots(dense(deltas), ties, share=share).dense(), expected, 1e-10)


def test_knots_with_a_plain_sum_is_task_arithmetic() -> None:
    deltas = tasks()
    for share in ("scaled", "plain"):
        got = knots(deltas, lambda parts: torch.stack(list(parts)).sum(0), share=share)
        assert_close(got.dense(), sum((d.dense() for d in deltas), torch.zeros(14, 9)), 1e-12)
    with pytest.raises(ConfigError, match="unknown share"):
        knots(deltas, ties, share="half")
    with pytest.raises(ShapeError, match="one shape"):
        aligned([factors(), factors(o=8)])


def whiten(m: Tensor) -> Tensor:
    p, _, qt = torch.linalg.svd(m, full_matrices=False)
    return p @ qt


@pytest.mark.parametrize("low", [True, False])
def test_task_singular_vectors_from_the_definition(low: bool) -> None:
    deltas: list[Delta] = list(tasks()) if low else [Dense(m) for m in matrices(3, 14, 9)]
    us, ss, vs = zip(*(torch.linalg.svd(d.dense(), full_matrices=False) for d in deltas), strict=True)
    k = min(9 // 3, 2 if low else 9)
    u = whiten(torch.cat([x[:, :k] for x in us], 1))
    v = whiten(torch.cat([x[:k] for x in vs], 0))
    s = torch.cat([w * x[:k] for w, x in zip((1.0, 0.5, 2.0), ss, strict=True)])
    assert_close(task_singular_vectors(deltas, (1.0, 0.5, 2.0)).dense(), u @ s.diag() @ v, 1e-11)


def test_one_task_alone_comes_back() -> None:
    delta = factors(3, 14, 9)
    assert_close(task_singular_vectors([delta], [1.0]).dense(), delta.dense(), 1e-12)


def test_shared_directions_are_left_out_not_invented() -> None:
    # the same adapter twice: the concatenated vectors have rank r, and the result stays in its row and column space
    delta = factors(2, 14, 9)
    merged = task_singular_vectors([delta, delta], [1.0, 1.0]).dense()
    u, _, vt = torch.linalg.svd(delta.dense())
    assert float((u[:, 2:].T @ merged).abs().max()) < 1e-12
    assert float((merged @ vt[2:].T).abs().max()) < 1e-12
    # each of the two copies keeps half of every direction: Σ (1/√2)² · 2 = the adapter itself
    assert_close(merged, delta.dense(), 1e-12)


def test_tsv_refuses() -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        task_singular_vectors(tasks(), [1.0] * 3, rank=4)
    with pytest.raises(ConfigError, match="do not fit"):
        task_singular_vectors([factors(1, 2, 2)] * 3, [1.0] * 3)
    with pytest.raises(ShapeError, match="matrices"):
        task_singular_vectors([Dense(torch.ones(3))], [1.0])


def test_partial_isometry() -> None:
    m = factors(3, 8, 5).dense()
    w = partial_isometry(m)
    assert_close(torch.linalg.svdvals(w), torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64), 1e-12)
    assert partial_isometry(m[:0]).shape == (0, 5)


@pytest.mark.parametrize("full", [True, False])
def test_isotropic_has_one_singular_value(full: bool) -> None:
    deltas: list[Delta] = [Dense(m) for m in matrices(3, 14, 9)] if full else list(tasks())
    weights = (1.0, 0.5, 2.0)
    total = sum((w * d.dense() for w, d in zip(weights, deltas, strict=True)), torch.zeros(14, 9))
    u, s, vt = torch.linalg.svd(total, full_matrices=False)
    q = 9 if full else 6
    got = isotropic(deltas, weights)
    assert got.rank == q
    assert_close(got.dense(), s[:q].mean() * u[:, :q] @ vt[:q], 1e-11)
    assert_close(torch.linalg.svdvals(got.dense())[:q], s[:q].mean().expand(q), 1e-12)


def test_isotropic_counts_only_directions_that_are_there() -> None:
    """A dense sum of low rank has zero singular values, which a mean over min(o, i) would count."""
    low = isotropic(tasks(2), [1.0, 1.0])
    assert low.rank == 4
    full = isotropic(dense(tasks(2)), [1.0, 1.0])
    assert full.rank == 4
    assert_close(full.dense(), low.dense(), 1e-11)


def test_isotropic_of_nothing_is_nothing() -> None:
    assert isotropic([factors().zeros()], [1.0]).rank == 0


@pytest.mark.parametrize("low", [True, False])
def test_projection_leaves_nothing_in_the_given_directions(low: bool) -> None:
    delta: Delta = factors(4, 14, 9) if low else Dense(factors(4, 14, 9).dense())
    weight = matrices(1, 14, 9, seed=5)[0]
    left, right = principal_subspace(weight, 3)
    got = project_out(delta, left=left, right=right)
    assert isinstance(got, LowRank) == low
    eye_o, eye_i = torch.eye(14, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    assert_close(got.dense(), (eye_o - left @ left.T) @ delta.dense() @ (eye_i - right @ right.T), 1e-12)
    assert float((left.T @ got.dense()).abs().max()) < 1e-13
    assert float((got.dense() @ right).abs().max()) < 1e-13
    one_side = project_out(delta, right=right).dense()
    assert_close(one_side, delta.dense() @ (eye_i - right @ right.T), 1e-12)
    # two-sided: the weight's own top triplets do not move under a small change
    s = torch.linalg.svdvals(weight)
    assert_close(torch.linalg.svdvals(weight + 1e-3 * got.dense())[:3], s[:3], 1e-12)


def test_projection_refuses() -> None:
    with pytest.raises(ShapeError, match="left"):
        project_out(factors(), left=torch.eye(3, dtype=torch.float64))
    with pytest.raises(ConfigError, match="not orthonormal"):
        project_out(factors(), right=torch.ones(5, 2, dtype=torch.float64))
    with pytest.raises(ConfigError, match="k is 0"):
        principal_subspace(torch.ones(3, 3), 0)
    with pytest.raises(ShapeError, match="matrix"):
        principal_subspace(torch.ones(3), 1)
