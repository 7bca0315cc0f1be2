"""Stacking and squeezing: exact, optimal, and honest about the error.  pytest tests/merge/test_compose.py"""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from moa.errors import ConfigError, ShapeError
from moa.merge import Dense, LowRank, squeeze, stack
from moa.merge.compose import thin_svd
from moa.spectrum import numerical_rank, rank_for_energy

from .tools import assert_close, factors

RANKS = (1, 3, 2)
WEIGHTS = (0.5, -1.2, 2.0)


def adapters() -> list[LowRank]:
    # alpha / r differs from adapter to adapter
    return [factors(r, 12, 9, seed=r, scale=s) for r, s in zip(RANKS, (0.1, 2.0, 7.0), strict=True)]


def summed() -> torch.Tensor:
    return sum((w * d.dense() for w, d in zip(WEIGHTS, adapters(), strict=True)), torch.zeros(12, 9))


def test_stack_is_the_weighted_sum_for_unequal_ranks_and_alphas() -> None:
    stacked = stack(adapters(), WEIGHTS)
    assert_close(stacked.dense(), summed(), 1e-14)
    assert stacked.rank == sum(RANKS)
    shared_scale = LowRank(stacked.down, torch.cat([d.up / d.up.norm() for d in adapters()], 1))
    with pytest.raises(AssertionError):  # one scale for all, as the released code has it, is not the sum
        assert_close(shared_scale.dense(), summed(), 0.1)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_stack_does_not_depend_on_the_order(order: tuple[int, ...]) -> None:
    stacked = stack([adapters()[t] for t in order], [WEIGHTS[t] for t in order])
    assert_close(stacked.dense(), summed(), 1e-14)


def test_a_constant_gate_mixture_equals_its_stacked_adapter() -> None:
    x = torch.randn(6, 9, dtype=torch.float64)
    mixture = sum(w * (x @ d.down.T) @ d.up.T for w, d in zip(WEIGHTS, adapters(), strict=True))
    stacked = stack(adapters(), WEIGHTS)
    assert_close((x @ stacked.down.T) @ stacked.up.T, mixture, 1e-14)  # type: ignore[arg-type]
    small = squeeze(stacked, 2)
    u, s, vt = torch.linalg.svd(summed().double())
    assert_close(small.delta.dense(), u[:, :2] @ s[:2].diag() @ vt[:2], 1e-12)


def test_stack_keeps_bits_where_nothing_is_scaled() -> None:
    stacked = stack(adapters())
    assert torch.equal(stacked.down, torch.cat([d.down for d in adapters()]))
    assert torch.equal(stacked.up, torch.cat([d.up for d in adapters()], 1))


def test_stack_refuses() -> None:
    with pytest.raises(ConfigError, match="2 weights for 3 adapters"):
        stack(adapters(), WEIGHTS[:2])
    with pytest.raises(ConfigError, match="no deltas"):
        stack([])
    with pytest.raises(ConfigError, match=r"delta 1 .* is dense"):
        stack([factors(), Dense(factors().dense())])
    with pytest.raises(ShapeError, match="different shapes"):
        stack([factors(), factors(o=8)])
    with pytest.raises(ConfigError, match="finite"):
        stack([factors()], [float("nan")])


@pytest.mark.parametrize(("rank", "o", "i"), [(4, 20, 11), (15, 20, 11), (0, 5, 4), (3, 3, 9)])
def test_thin_svd_equals_the_dense_one(rank: int, o: int, i: int) -> None:
    delta = factors(rank, o, i)
    u, s, vt = thin_svd(delta)
    assert_close(u @ s.diag() @ vt, delta.dense(), 1e-13)
    full = torch.linalg.svdvals(delta.dense())
    assert_close(s, full[: len(s)], 1e-13)
    assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64), 1e-12)
    assert numerical_rank(s, (o, i)) == min(rank, o, i)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("dense", [False, True])
def test_squeeze_is_the_truncated_svd_and_says_its_error(k: int, dense: bool) -> None:
    delta = factors(6, 20, 11)
    full = delta.dense()
    result = squeeze(Dense(full) if dense else delta, k)
    s = torch.linalg.svdvals(full)
    optimal = float(s[k:].square().sum().sqrt())
    assert result.delta.rank == k
    assert result.optimal == pytest.approx(optimal, rel=1e-12)
    assert result.error == pytest.approx(optimal, rel=1e-12)
    assert float((full - result.delta.dense()).norm()) == pytest.approx(optimal, rel=1e-12)
    assert result.relative == pytest.approx(optimal / float(full.norm()), rel=1e-12)


def test_squeeze_to_its_own_rank_is_lossless() -> None:
    delta = stack([factors(3, 20, 11), factors(3, 20, 11)])  # rank 6 in store, 3 in fact
    result = squeeze(delta, 6)
    assert result.delta.rank == 3
    assert_close(result.delta.dense(), delta.dense(), 1e-13)
    assert result.relative < 1e-14


# Halko et al., Theorem 10.5: without power iterations the expected error is within √(1 + k / (oversample - 1)).
@pytest.mark.parametrize(("power", "worst"), [(0, (1 + 6 / 7) ** 0.5), (2, 1.001), (20, 1 + 1e-9)])
@pytest.mark.parametrize("dense", [False, True])
def test_randomized_squeeze_is_near_optimal_and_never_better(power: int, worst: float, dense: bool) -> None:
    delta = factors(16, 48, 64)
    exact = squeeze(delta, 6)
    assert exact.optimal is not None
    source = Dense(delta.dense()) if dense else delta
    result = squeeze(source, 6, method="randomized", power=power)
    assert exact.optimal * (1 - 1e-12) <= result.error <= worst * exact.optimal
    assert result.error == pytest.approx(float((delta.dense() - result.delta.dense()).norm()), rel=1e-10)
    assert result.optimal is None if dense else result.optimal == pytest.approx(exact.optimal, rel=1e-12)


def test_energy_gives_the_smallest_rank() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    total = float(s.square().sum())
    for k in range(1, 5):
        share = float(s[:k].square().sum()) / total
        assert rank_for_energy(s, share - 1e-9) == k
        assert rank_for_energy(s, min(share + 1e-9, 1.0)) == min(k + 1, 4)
    assert rank_for_energy(torch.zeros(3), 0.9) == 0
    delta = factors(5, 20, 11)
    assert squeeze(delta, energy=1.0).delta.rank == 5
    assert squeeze(delta, energy=0.5).relative <= 0.5**0.5


def test_a_zero_change_squeezes_to_nothing() -> None:
    result = squeeze(Dense(torch.zeros(4, 3)), 2)
    assert result.delta.rank == 0
    assert result.relative == 0


def test_squeeze_refuses() -> None:
    for call, match in (
        (lambda: squeeze(factors()), "rank or energy"),
        (lambda: squeeze(factors(), 2, energy=0.5), "rank or energy"),
        (lambda: squeeze(factors(), 0), "at least 1"),
        (lambda: squeeze(factors(), energy=1.5), "energy is 1.5"),
        (lambda: squeeze(factors(), 2, method="randomised"), "Did you mean 'randomized'"),
        (lambda: squeeze(factors(), energy=0.5, method="randomized"), "needs a rank"),
    ):
        with pytest.raises(ConfigError, match=match):
            call()
    with pytest.raises(ShapeError, match="needs a matrix"):
        squeeze(Dense(torch.ones(3)), 1)
