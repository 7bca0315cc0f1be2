"""Ranks within a budget. Run: pytest tests/federated"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moa
from moa.errors import ConfigError, NumericsError
from moa.experts import ExpertBank
from moa.federated.importance import within_budget
from tests import models


def batches(count=2):
    return [models.class_batch(seed=n) for n in range(count)]


def costs_of(model):
    return {n: sum(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize("budget", [30, 100, 500, 2000, 10**6])
def test_a_plan_never_costs_more_than_its_budget_and_builds_what_it_says(budget):
    model = models.bert()
    costs = costs_of(model)
    plan = moa.allocate_ranks(model, batches(), budget, most=8)
    assert plan.parameters == sum(r * costs[n] for n, r in plan.ranks.items()) <= budget
    left = budget - plan.parameters
    assert left < max(costs.values()) or max(plan.ranks.values()) == 8
    if not plan.ranks:
        return
    built = moa.build(model, plan.recipes("topk", n_experts=2, k=1))
    banks = {n: m.branches[0].bank for n, m in built.mixtures().items()}
    assert {n: b.rank for n, b in banks.items()} == plan.ranks
    held = sum(p.numel() for b in built.modules() if isinstance(b, ExpertBank) for p in b.parameters())
    assert held == 2 * plan.parameters
    assert built(**batches()[0]).loss.isfinite()


@given(
    st.lists(st.tuples(st.lists(st.floats(0, 1e6), max_size=6), st.integers(1, 50)), min_size=1, max_size=6),
    st.integers(1, 2000),
)
@settings(max_examples=100, deadline=None)
def test_any_gains_stay_within_any_budget(layers, budget):
    gains = {str(n): sorted(units, reverse=True) for n, (units, _) in enumerate(layers)}
    costs = {str(n): cost for n, (_, cost) in enumerate(layers)}
    ranks = within_budget(gains, costs, budget)
    assert sum(ranks[n] * costs[n] for n in ranks) <= budget
    assert all(0 <= ranks[n] <= len(gains[n]) for n in ranks)
    for name, rank in ranks.items():  # nothing that helps and fits is left
        if rank < len(gains[name]) and gains[name][rank] > 0:
            assert sum(ranks[n] * costs[n] for n in ranks) + costs[name] > budget


def test_the_best_ranks_by_trying_all():
    """Equal costs: no other choice of ranks catches more."""
    gains = {"a": [9.0, 4.0, 1.0], "b": [8.0, 7.0, 6.0], "c": [5.0, 0.5, 0.1]}
    found = within_budget(gains, dict.fromkeys(gains, 10), 45)
    choices = [(a, b, c) for a in range(4) for b in range(4) for c in range(4) if a + b + c <= 4]
    best = max(sum(sum(gains[n][:r]) for n, r in zip("abc", c, strict=True)) for c in choices)
    assert sum(sum(gains[n][:r]) for n, r in found.items()) == best


def test_layers_of_one_importance_get_one_rank():
    gains = {str(n): [3.0] * 8 for n in range(5)}
    assert set(within_budget(gains, dict.fromkeys(gains, 7), 7 * 5 * 3).values()) == {3}


def test_importance_is_the_gradient_of_the_weight():
    model = models.bert()
    plan = moa.allocate_ranks(model, batches(1), 10**6, most=64)
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    weight.requires_grad_(True)
    model(**batches(1)[0]).loss.backward()
    name = "bert.encoder.layer.0.intermediate.dense"
    assert plan.importance[name] == pytest.approx(weight.grad.square().sum().item(), rel=1e-4)
    assert plan.ranks[name] <= int(torch.linalg.matrix_rank(weight.grad)) + 16
    assert all(m._forward_hooks == {} for m in model.modules())


def test_a_layer_that_matters_gets_more():
    model = models.plain()
    with torch.no_grad():
        model.up.weight.mul_(100)
    x = models.plain_batch(rows=16)
    plan = moa.allocate_ranks(model, [x], 27 * 2, targets=("up", "down"), loss=lambda out: out[0], most=3)
    other = models.plain()
    flat = moa.allocate_ranks(other, [x], 27 * 2, targets=("up", "down"), loss=lambda out: out[0], most=3)
    assert plan.importance["down"] / plan.importance["up"] > 100 * flat.importance["down"] / flat.importance["up"]
    assert plan.ranks["down"] == 2 and "up" not in plan.ranks


def test_least_is_for_every_layer_and_most_for_none_to_pass():
    model = models.bert()
    plan = moa.allocate_ranks(model, batches(), 3000, least=1, most=2)
    assert set(plan.ranks) == {s for s in costs_of(model) if s in plan.importance}
    assert set(plan.ranks.values()) <= {1, 2}
    with pytest.raises(ConfigError, match=r"a budget of 100 parameters is .* short of rank 2 in"):
        moa.allocate_ranks(model, batches(), 100, least=2)


def test_bad_inputs_are_named():
    model = models.bert()
    for options, message in (
        ({"budget": 0}, "budget must be a whole number of at least 1, got 0"),
        ({"budget": 10.5}, "budget must be a whole number"),
        ({"budget": 10, "least": -1}, "least must be"),
        ({"budget": 10, "least": 3, "most": 2}, "most must be a whole number of at least 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            moa.allocate_ranks(model, batches(), **options)
    with pytest.raises(ConfigError, match="there is no data"):
        moa.allocate_ranks(model, [], 100)
    without = {k: v for k, v in batches()[0].items() if k != "labels"}
    with pytest.raises(ConfigError, match="has no loss: put labels into the data"):
        moa.allocate_ranks(model, [without], 100)
    with pytest.raises(ConfigError, match="on the meta device"):
        moa.allocate_ranks(models.bert().to("meta"), batches(), 100)
    with pytest.raises(ConfigError, match="give the base"):
        moa.allocate_ranks(moa.build(models.bert(), "topk", n_experts=2), batches(), 100)
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="its gradient holds NaN"):
        moa.allocate_ranks(model, batches(), 100)
    plan = moa.allocate_ranks(models.bert(), batches(), 100)
    with pytest.raises(ConfigError, match="rank=4: a plan says"):
        plan.recipes(rank=4)
