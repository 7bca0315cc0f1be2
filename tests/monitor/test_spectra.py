"""Spectra of weight changes against closed forms: flat spectra, products, and factors in another gauge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moa.delta import Dense, LowRank, Sparse, low_rank
from moa.errors import ConfigError, ShapeError
from moa.monitor.spectra import effective_rank, entropy, gradient_alignment, overlap, profile, singular_values


def drawn(o: int, i: int, rank: int, seed: int = 0) -> LowRank:
    rng = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((o, rank), (rank, i)))
    return low_rank(down, up)


def test_values_of_factors_are_those_of_the_product() -> None:
    change = drawn(12, 20, 3)
    values = singular_values(change)
    torch.testing.assert_close(values, torch.linalg.svdvals(change.dense())[:3])
    torch.testing.assert_close(singular_values(Dense(change.dense()))[:3], values)
    assert effective_rank(change) == pytest.approx(effective_rank(change.dense()))


def test_a_flat_spectrum_has_its_whole_rank_and_one_direction_has_rank_one() -> None:
    flat = torch.linalg.qr(torch.randn(16, 4, dtype=torch.float64)).Q
    assert effective_rank(low_rank(flat.T @ torch.eye(16, dtype=torch.float64), flat)) == pytest.approx(4)
    assert effective_rank(drawn(16, 16, 1)) == pytest.approx(1)
    assert effective_rank(low_rank(torch.zeros(2, 5), torch.zeros(4, 2))) == 0
    assert entropy(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(math.log(2))
    assert entropy(torch.tensor([2.0, 1.0])) == pytest.approx(-0.8 * math.log(0.8) - 0.2 * math.log(0.2))  # of squares


def test_nothing_depends_on_the_gauge() -> None:
    change = drawn(16, 16, 4)
    gauge = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = LowRank(torch.linalg.solve(gauge, change.down), change.up @ gauge)
    torch.testing.assert_close(singular_values(other), singular_values(change), rtol=1e-10, atol=1e-10)
    assert profile(other) == pytest.approx(profile(change), abs=1e-10)
    assert overlap(change, other) == pytest.approx({"outputs": 1, "inputs": 1, "change": 1}, abs=1e-10)


def test_the_profile_of_a_random_change_dips_at_the_cut_between_rows_and_columns() -> None:
    found = profile(drawn(64, 64, 4))
    assert list(found) == [2**n for n in range(1, 12)]
    assert found[64] <= math.log(4)
    assert found[8] < found[16] > found[32] > found[64] < found[128] < found[256] > found[512]  # a valley
    assert [found[n] for n in (2, 4)] == pytest.approx([math.log(2), math.log(4)], abs=0.05)  # a volume law outside it
    flat = torch.eye(8, dtype=torch.float64)
    assert profile(flat)[8] == pytest.approx(math.log(8))  # equality where the spectrum is flat


@pytest.mark.parametrize(("o", "i", "rank"), [(64, 64, 4), (12, 20, 3), (7, 9, 2), (30, 8, 12), (5, 1, 1)])
def test_the_profile_of_factors_is_that_of_the_product(o: int, i: int, rank: int) -> None:
    change = drawn(o, i, rank)
    found, dense = profile(change), profile(change.dense())
    assert list(found) == list(dense)
    assert found == pytest.approx(dense, abs=1e-10)


def test_a_product_has_no_entropy_at_any_cut() -> None:
    parts = [torch.randn(n, dtype=torch.float64) for n in (3, 2, 2, 5, 2)]
    whole = parts[0]
    for part in parts[1:]:
        whole = torch.outer(whole, part).flatten()
    found = profile(whole.view(12, 10))
    assert list(found) == [3, 6, 12, 60]
    assert max(found.values()) < 1e-10


def test_overlaps_are_those_of_the_angles_between_subspaces() -> None:
    first, second = drawn(12, 9, 3, seed=1), drawn(12, 9, 2, seed=2)
    found = overlap(first, second)
    for side, a, b in (("outputs", first.up, second.up), ("inputs", first.down.T, second.down.T)):
        shared = torch.trace(a @ torch.linalg.pinv(a) @ b @ torch.linalg.pinv(b))  # of the two projections: Σ cos²
        assert found[side] == pytest.approx(shared.item() / 2)
    assert found == pytest.approx(overlap(Dense(first.dense()), second))
    cosine = torch.cosine_similarity(first.dense().flatten(), second.dense().flatten(), 0).item()
    assert found["change"] == pytest.approx(cosine)
    assert overlap(first, first.scaled(-2))["change"] == pytest.approx(-1)
    rows = torch.eye(12, dtype=torch.float64)
    apart = overlap(Dense(rows[:3].T @ torch.randn(3, 9).double()), Dense(rows[3:5].T @ torch.randn(2, 9).double()))
    assert apart["outputs"] == pytest.approx(0, abs=1e-20)
    assert apart["change"] == 0
    assert overlap(first, first.zeros())["outputs"] == 0


def test_sparse_changes_say_which_places_they_share() -> None:
    size = torch.Size((4, 5))
    first = Sparse(torch.tensor([0, 3, 7]), torch.ones(3), size)
    second = Sparse(torch.tensor([3, 7, 8, 9]), torch.ones(4), size)
    assert overlap(first, second)["places"] == pytest.approx(2 / 5)


def test_gradients_of_tasks_that_pull_apart_have_a_cosine_below_zero() -> None:
    w = torch.zeros(3, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)

    def towards(*target: float) -> Tensor:
        return ((w - torch.tensor(target)) ** 2).sum()

    names, cosines = gradient_alignment(
        {"a": towards(1, 0, 0), "b": towards(-2, 0, 0), "c": towards(0, 3, 0)}, [w, unused]
    )
    assert names == ["a", "b", "c"]
    torch.testing.assert_close(cosines, torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 1]], dtype=torch.float64))
    with pytest.raises(ConfigError, match="the loss of 'still' has no gradient"):
        gradient_alignment({"still": towards(0, 0, 0)}, [w])


def test_what_has_no_spectrum_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"a matrix \(o, i\), got \(3,\)"):
        profile(torch.ones(3))
    with pytest.raises(ShapeError, match="are of other layers"):
        overlap(drawn(4, 5, 1), drawn(5, 4, 1))
