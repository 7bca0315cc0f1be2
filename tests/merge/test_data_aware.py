"""RegMean, Fisher, AdaMerging: least squares, weighted means, a quadratic with a known minimum.

pytest tests/merge/test_data_aware.py
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from moa.errors import ConfigError, NumericsError, ShapeError
from moa.merge import Delta, Dense, LowRank, adamerge, deltas, fisher, gram, regmean

from .tools import assert_close, factors, matrices

WEIGHTS = (1.0, 0.5, 2.0)


def inputs(n: int = 3, rows: int = 30, i: int = 5) -> list[Tensor]:
    return matrices(n, rows, i, seed=9)


def test_regmean_is_the_least_squares_solution() -> None:
    changes, xs = matrices(), inputs()
    got = regmean([Dense(c) for c in changes], WEIGHTS, [gram(x) for x in xs], shrink=1.0)
    stacked_x = torch.cat([w**0.5 * x for w, x in zip(WEIGHTS, xs, strict=True)])
    stacked_y = torch.cat([w**0.5 * x @ c.T for w, x, c in zip(WEIGHTS, xs, changes, strict=True)])
    assert_close(got.dense(), torch.linalg.lstsq(stacked_x, stacked_y).solution.T, 1e-10)


def test_regmean_with_shrinkage_and_on_whole_weights() -> None:
    changes, xs = matrices(), inputs()
    base = matrices(1, seed=4)[0]
    gs = [gram(x) for x in xs]
    shrunk = [0.6 * g + 0.4 * torch.diag(torch.diag(g)) for g in gs]
    above = sum(w * (base + c) @ g for w, c, g in zip(WEIGHTS, changes, shrunk, strict=True))
    whole = above @ torch.linalg.inv(sum(w * g for w, g in zip(WEIGHTS, shrunk, strict=True)))  # type: ignore[arg-type, operator]
    got = regmean([Dense(c) for c in changes], WEIGHTS, gs, shrink=0.6)
    assert_close(base + got.dense(), whole, 1e-10)


def test_regmean_limits() -> None:
    low: list[Delta] = [factors(2, seed=s) for s in range(3)]
    same = [torch.eye(5, dtype=torch.float64)] * 3
    mean = sum(w * d.dense() for w, d in zip(WEIGHTS, low, strict=True)) / sum(WEIGHTS)  # type: ignore[operator]
    assert_close(regmean(low, WEIGHTS, same).dense(), mean, 1e-12)
    only_diagonal = [torch.diag(torch.rand(5, dtype=torch.float64) + 0.1) for _ in range(3)]
    got = regmean(low, (1.0, 1.0, 1.0), only_diagonal, shrink=0.3).dense()
    by_column = sum(d.dense() * g.diag() for d, g in zip(low, only_diagonal, strict=True)) / sum(only_diagonal).diag()  # type: ignore[operator, union-attr]
    assert_close(got, by_column, 1e-12)


def test_regmean_refuses() -> None:
    changes: list[Delta] = [Dense(m) for m in matrices()]
    gs = [gram(x) for x in inputs()]
    with pytest.raises(ConfigError, match="shrink"):
        regmean(changes, WEIGHTS, gs, shrink=1.5)
    with pytest.raises(ConfigError, match="2 Gram matrices for 3"):
        regmean(changes, WEIGHTS, gs[:2])
    with pytest.raises(ShapeError, match="expected"):
        regmean(changes, WEIGHTS, [torch.eye(4, dtype=torch.float64)] * 3)
    dead = [torch.zeros(5, 5, dtype=torch.float64)] * 3
    with pytest.raises(NumericsError, match="not positive definite"):
        regmean(changes, WEIGHTS, dead)


def test_gram_sums_over_all_rows() -> None:
    x = torch.randn(2, 3, 5)
    assert gram(x).dtype == torch.float64
    assert_close(gram(x), x.double().view(6, 5).T @ x.double().view(6, 5), 1e-14)


def test_fisher_is_the_entrywise_weighted_mean() -> None:
    changes, diagonals = matrices(), [m.square() for m in matrices(seed=8)]
    got = fisher([Dense(c) for c in changes], WEIGHTS, diagonals, floor=0.01)
    top = sum(w * (f + 0.01) * c for w, f, c in zip(WEIGHTS, diagonals, changes, strict=True))
    bottom = sum(w * (f + 0.01) for w, f in zip(WEIGHTS, diagonals, strict=True))
    assert_close(got.dense(), top / bottom, 1e-13)  # type: ignore[operator]
    uniform = fisher([Dense(c) for c in changes], (1.0, 1.0, 1.0), [torch.ones(7, 5).double()] * 3)
    assert_close(uniform.dense(), torch.stack(changes).mean(0), 1e-13)


def test_fisher_refuses() -> None:
    changes: list[Delta] = [Dense(c) for c in matrices()]
    ones = torch.ones(7, 5, dtype=torch.float64)
    with pytest.raises(ConfigError, match="1 Fisher diagonals for 3"):
        fisher(changes, WEIGHTS, [ones])
    with pytest.raises(ShapeError, match="diagonal"):
        fisher(changes, WEIGHTS, [ones[:2]] * 3)
    for bad in (-ones, ones * float("nan")):
        with pytest.raises(NumericsError, match="negative or non-finite"):
            fisher(changes, WEIGHTS, [bad] * 3)
    with pytest.raises(NumericsError, match="not determined"):
        fisher(changes, WEIGHTS, [0 * ones] * 3, floor=0.0)


def tasks() -> list[dict[str, LowRank]]:
    return [{"0.w": factors(2, seed=t), "1.w": factors(2, seed=t + 5)} for t in range(2)]


def quadratic(truth: dict[str, tuple[float, float]]) -> object:
    """A loss whose minimum has the given coefficients, one pair per tensor."""
    sets = tasks()
    goal = {n: sum(c * s[n].dense() for c, s in zip(truth[n], sets, strict=True)) for n in truth}

    def loss(merged: Mapping[str, Tensor]) -> Tensor:
        return sum(((merged[n] - goal[n]) ** 2).mean() for n in goal)  # type: ignore[return-value]

    return loss


def test_adamerging_task_wise_finds_the_coefficients() -> None:
    loss = quadratic({"0.w": (0.2, 0.9), "1.w": (0.2, 0.9)})
    got = adamerge([deltas(t) for t in tasks()], loss, steps=400, lr=0.02)  # type: ignore[arg-type]
    assert got.coefficients.shape == (2,)
    assert_close(got.coefficients, torch.tensor([0.2, 0.9], dtype=torch.float64), 1e-3)
    assert got.losses[-1] < 1e-6 < got.losses[0]
    assert len(got.losses) == 401


def test_adamerging_layer_wise_finds_one_row_per_layer() -> None:
    loss = quadratic({"0.w": (0.2, 0.9), "1.w": (0.7, -0.1)})
    got = adamerge([deltas(t) for t in tasks()], loss, layer_of=lambda n: n[0], steps=400, lr=0.02)  # type: ignore[arg-type]
    assert got.layers == ("0", "1")
    assert_close(got.coefficients, torch.tensor([[0.2, 0.9], [0.7, -0.1]], dtype=torch.float64), 1e-3)


def test_adamerging_starts_where_it_is_told_and_runs_under_no_grad() -> None:
    loss = quadratic({"0.w": (0.2, 0.9), "1.w": (0.2, 0.9)})
    sets = [deltas(t) for t in tasks()]
    with torch.no_grad():
        assert adamerge(sets, loss, steps=0).coefficients.tolist() == [0.3, 0.3]  # type: ignore[arg-type]
        assert adamerge(sets, loss, steps=0, weights=(1.0, 2.0)).coefficients.tolist() == [1.0, 2.0]  # type: ignore[arg-type]
        assert len(adamerge(sets, loss, steps=1).losses) == 2  # type: ignore[arg-type]


def test_adamerging_refuses() -> None:
    sets = [deltas(t) for t in tasks()]
    with pytest.raises(NumericsError, match="finite scalar"):
        adamerge(sets, lambda m: m["0.w"])
    with pytest.raises(NumericsError, match="finite scalar"):
        adamerge(sets, lambda m: m["0.w"].sum() * float("nan"))
    with pytest.raises(NumericsError, match="does not depend"):
        adamerge(sets, lambda m: torch.tensor(1.0))
    with pytest.raises(ConfigError, match="steps is -1"):
        adamerge(sets, lambda m: m["0.w"].sum(), steps=-1)
    with pytest.raises(ConfigError, match="3 weights for 2"):
        adamerge(sets, lambda m: m["0.w"].sum(), weights=(1.0, 1.0, 1.0))
