"""Aggregators against Σ p s B A, what they claim, and what they cost. Run: pytest tests/federated"""

from __future__ import annotations

import pytest
import torch

from moa.errors import ConfigError, ShapeError
from moa.federated import AGGREGATORS, aggregator
from moa.federated.aggregators import Factors, cut, mean_of_products

D_IN, D_OUT = 10, 8
WEIGHTS = [0.5, 0.3, 0.2]
EXACT = {"flora", "fedex", "ffa", "fedsb"}  # by the papers
ANY_RANK = {"flora", "flexlora", "zero_pad"}


def clients(ranks=(3, 3, 3), experts=(2,), shared=None, scales=(2.0, 0.5, 1.0)):
    rng = torch.Generator().manual_seed(0)

    def draw(side, width):
        made = [torch.randn(*experts, r, width, generator=rng, dtype=torch.float64) for r in ranks]
        return [made[0]] * len(ranks) if shared == side else made

    return [Factors(*each) for each in zip(draw("down", D_IN), draw("up", D_OUT), scales, strict=True)]


def summed(given, weights):
    """Σ p s B A, term by term."""
    return sum(p * c.scaling * c.up.mT @ c.down for p, c in zip(weights, given, strict=True))


def test_the_table_is_the_papers():
    assert {name for name, row in AGGREGATORS.items() if row.exact} == EXACT
    assert {name for name, row in AGGREGATORS.items() if row.ranks} == ANY_RANK


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_what_claims_to_be_exact_is(name, weights):
    row = aggregator(name)
    given = clients(shared=row.frozen)
    truth = summed(given, weights)
    torch.testing.assert_close(mean_of_products(given, weights), truth, rtol=1e-12, atol=1e-12)
    error = (row.run(given, weights).dense() - truth).norm() / truth.norm()
    if row.exact or weights[0] == 1:
        assert error < 1e-10
    else:
        assert error > 0.1  # the product of means, or the cut, is far away


@pytest.mark.parametrize("name", AGGREGATORS)
def test_ranks_of_their_own_are_taken_or_refused(name):
    row, given = aggregator(name), clients(ranks=(2, 3, 5))
    if not row.ranks:
        with pytest.raises(ShapeError, match=f"{name} takes the mean .* 'flora' stacks factors of any rank"):
            row.run(given, WEIGHTS)
        return
    found = row.run(given, WEIGHTS)
    assert found.factors.down.shape[-2] == (10 if name == "flora" else 5)
    if row.exact:
        torch.testing.assert_close(found.dense(), summed(given, WEIGHTS), rtol=1e-10, atol=1e-10)


def test_zeros_fill_up_to_the_mean_of_padded_factors():
    given = clients(ranks=(2, 3, 5))
    found = aggregator("zero_pad").run(given, WEIGHTS).factors
    last = sum(p * c.down[:, r] for p, c in zip(WEIGHTS, given, strict=True) for r in [3] if r < c.down.shape[1])
    torch.testing.assert_close(found.down[:, 3], last, rtol=1e-12, atol=1e-12)


def test_the_cut_is_the_nearest_of_its_rank_and_so_are_its_first_rows():
    given = clients(ranks=(2, 3, 5))
    truth = summed(given, WEIGHTS)  # (2, 8, 10)
    found = aggregator("flexlora").run(given, WEIGHTS).factors
    values = torch.linalg.svdvals(truth)
    for rank in (5, 3, 1):
        first = Factors(found.down[:, :rank], found.up[:, :rank], found.scaling)
        left = torch.linalg.matrix_norm(truth - first.dense())
        torch.testing.assert_close(left, values[:, rank:].square().sum(-1).sqrt(), rtol=1e-10, atol=1e-10)
    whole = cut(given[0], 8)  # beyond its rank: nothing is lost, zeros fill it up
    torch.testing.assert_close(whole.dense(), given[0].dense(), rtol=1e-10, atol=1e-10)
    wide = cut(given[0], 12)  # beyond the layer
    assert wide.down.shape == (2, 12, D_IN) and torch.equal(wide.up[:, 8:], torch.zeros(2, 4, D_OUT).double())


def test_stacking_has_the_ranks_sum_and_no_order():
    given = clients(ranks=(2, 3, 5))
    there, back = (aggregator("flora").run(g, w) for g, w in ((given, WEIGHTS), (given[::-1], WEIGHTS[::-1])))
    torch.testing.assert_close(there.dense(), back.dense(), rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(there.dense()).tolist() == [8, 8]  # 10, but for the layer's 8 outputs


def test_the_residual_s_rank_is_bounded_and_clients_of_one_mind_leave_none():
    given = clients(ranks=(1, 1, 1))
    residual = aggregator("fedex").run(given, WEIGHTS).residual
    assert (torch.linalg.matrix_rank(residual) <= 4).all()  # (K + 1) r
    same = aggregator("fedex").run([given[0]] * 3, WEIGHTS)
    assert same.residual.abs().max() < 1e-14


def test_frozen_sides_that_differ_are_refused():
    with pytest.raises(ConfigError, match="the clients' down factors are not the same: freeze them"):
        aggregator("ffa").run(clients(), WEIGHTS)
    with pytest.raises(ConfigError, match="the clients' up factors are not the same: Fed-SB trains cores"):
        aggregator("fedsb").run(clients(), WEIGHTS)
    with pytest.raises(ConfigError, match=r"unknown aggregator 'fedits'.*'fedit'"):
        aggregator("fedits")
