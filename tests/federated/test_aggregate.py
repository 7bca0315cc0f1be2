"""Aggregators against Σ p s B A, what they claim, and what they cost."""

from __future__ import annotations

import pytest
import torch

import moa
from moa.errors import ConfigError, ShapeError
from moa.federated import AGGREGATORS, aggregate_states, aggregator, upload_bytes
from moa.federated.aggregators import Factors, mean_of_products
from tests import models

D_IN, D_OUT = 10, 8
WEIGHTS = [0.5, 0.3, 0.2]


def clients(ranks=(3, 3, 3), experts=(2,), shared_down=False, scales=(2.0, 0.5, 1.0)):
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*experts, *shape, generator=rng, dtype=torch.float64)

    downs = [draw(r, D_IN) for r in ranks]
    downs = [downs[0]] * len(ranks) if shared_down else downs
    return [Factors(down, draw(r, D_OUT), s) for down, r, s in zip(downs, ranks, scales, strict=True)]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_what_claims_to_be_exact_is(name):
    row = aggregator(name)
    given = clients(shared_down=name in ("ffa", "fedsb"))
    truth = mean_of_products(given, WEIGHTS)
    error = (row.run(given, WEIGHTS).dense() - truth).norm() / truth.norm()
    assert (error < 1e-10) == row.exact
    if not row.exact:
        assert error > 0.3  # the product of means is far away


@pytest.mark.parametrize("name", AGGREGATORS)
def test_ranks_of_their_own_are_taken_or_refused(name):
    row, given = aggregator(name), clients(ranks=(2, 3, 5), shared_down=False)
    if not row.ranks:
        with pytest.raises(ShapeError, match=f"{name} takes the mean .* 'flora' stacks factors of any rank"):
            row.run(given, WEIGHTS)
        return
    found = row.run(given, WEIGHTS)
    assert found.factors.down.shape[-2] == (10 if name == "flora" else 5)
    if row.exact:
        torch.testing.assert_close(found.dense(), mean_of_products(given, WEIGHTS), rtol=1e-10, atol=1e-10)


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
    for name in ("ffa", "fedsb"):
        with pytest.raises(ConfigError, match="the clients' down factors are not the same: freeze them"):
            aggregator(name).run(clients(), WEIGHTS)
    with pytest.raises(ConfigError, match=r"unknown aggregator 'fedits'.*'fedit'"):
        aggregator("fedits")


def mixture(router="topk", seed=0, **options):
    options = {"n_experts": 3, "rank": 2} | options
    return models.randomise(moa.build(models.bert().double(), router, **options).double(), seed=seed)


@pytest.mark.parametrize("routers", ["average", "local"])
def test_a_mixture_is_aggregated_expert_by_expert(routers):
    trained = [mixture(seed=seed) for seed in (1, 2)]
    states = [m.adapter_state_dict() for m in trained]
    found, residuals = aggregate_states(states, [1, 3], "flora", routers=routers)
    assert not residuals
    pairs = [name for name in found if name.endswith(".bank.down")]
    for name in pairs:
        up = name.replace("bank.down", "bank.up")
        got = Factors(found[name], found[up]).dense()
        assert found[name].shape[:2] == (3, 4)
        for e in range(3):
            parts = [p * s[up][e].T @ s[name][e] for p, s in zip((0.25, 0.75), states, strict=True)]
            torch.testing.assert_close(got[e], sum(parts))
    gates = [name for name in states[0] if ".router." in name]
    assert gates
    for name in gates:
        if routers == "local":
            assert name not in found
        else:
            torch.testing.assert_close(found[name], 0.25 * states[0][name] + 0.75 * states[1][name])


def test_a_model_goes_on_from_the_server_s_state():
    """Clients with one frozen down factor: the server's model is the weighted mean of their changes."""
    trained = [mixture("fixed", seed=seed, n_experts=1) for seed in (1, 2)]
    for name, value in trained[1].adapter_state_dict().items():
        if name.endswith("bank.down"):
            value.data.copy_(trained[0].adapter_state_dict()[name])
    found, _ = aggregate_states([m.adapter_state_dict() for m in trained], [1, 1], "ffa")
    server = mixture("fixed", n_experts=1)
    missing = server.load_state_dict(found, strict=False)
    assert not missing.unexpected_keys
    for (name, branch), *others in zip(server.branches(), *(m.branches() for m in trained), strict=True):
        mean = sum(other.bank.delta(0).dense() for _, other in others) / 2
        torch.testing.assert_close(branch.bank.delta(0).dense(), mean, msg=name)


def test_cores_cost_their_square_whatever_the_layer_and_the_clients():
    trained = [mixture("fixed", seed=seed, n_experts=1, expert="core", rank=4) for seed in (1, 2, 3)]
    states = [m.adapter_state_dict() for m in trained]
    found, _ = aggregate_states(states, [1, 1, 2], "fedsb")
    cores = [name for name in found if name.endswith("bank.core")]
    layers = len(list(trained[0].branches()))
    assert upload_bytes(states[0], cores) == upload_bytes(found, cores) == layers * 4 * 4 * 8
    for (name, branch), *others in zip(
        mixture_of(found, trained[0]).branches(), *(m.branches() for m in trained), strict=True
    ):
        mean = sum(p * o.bank.delta(0).dense() for p, (_, o) in zip((0.25, 0.25, 0.5), others, strict=True))
        torch.testing.assert_close(branch.bank.delta(0).dense(), mean, rtol=1e-10, atol=1e-10, msg=name)


def mixture_of(state, like):
    model = mixture("fixed", n_experts=1, expert="core", rank=4)
    model.load_state_dict({**like.state_dict(), **state})
    return model


def test_clients_that_do_not_fit_are_named():
    state = mixture().adapter_state_dict()
    with pytest.raises(ConfigError, match="client 1 has another model than client 0: only one of them has"):
        aggregate_states([state, dict(list(state.items())[1:])], [1, 1])
    with pytest.raises(ConfigError, match="weights must be positive, got 0"):
        aggregate_states([state, state], [1, 0])
    with pytest.raises(ConfigError, match="there are 1 and 2"):
        aggregate_states([state], [1, 1])
    with pytest.raises(ConfigError, match="leaves a residual for each of 3 experts"):
        aggregate_states([state, mixture(seed=9).adapter_state_dict()], [1, 1], "fedex")
    with pytest.raises(ConfigError, match="routers must be 'average' or 'local', got 'mine'"):
        aggregate_states([state], [1], routers="mine")
