"""Losses on routings against transformers, loops and enumeration. Run: pytest tests/objective/test_losses.py"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moa
from moa.errors import ConfigError, ContextError, ShapeError
from moa.objective.losses import (
    LOSSES,
    balance_loss,
    entropy,
    example_losses,
    importance_loss,
    load_loss,
    masked_sums,
    mean_of,
    rloo,
    z_loss,
)
from moa.objective.objective import auxiliary_losses
from moa.objective.trace import Trace
from moa.recipes import RECIPES
from moa.routers import LinearRouter
from moa.types import Context, Routing
from tests import models
from tests.laws import assert_close


def routing_of(logits: torch.Tensor, k: int) -> Routing:
    """Return the routing of a softmax top-k gate with given logits."""
    scores = logits.softmax(-1)
    weights, indices = scores.topk(k, -1)
    return Routing(weights, indices, logits.shape[-1], logits, scores)


@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_balance_loss_times_k_is_that_of_transformers(n_experts, k, padded):
    logits = torch.randn(3, 7, n_experts, dtype=torch.float64)
    mask = torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[0, 4:] = 0
        mask[2, 1:] = 0
    theirs = load_balancing_loss_func((logits.reshape(21, -1),), n_experts, k, mask if padded else None)
    ours = balance_loss(routing_of(logits, k), mask.bool() if padded else None)
    assert_close(ours * k, theirs, 3e-7)  # theirs counts in fp32


def traced(layers: list[torch.Tensor], k: int, mask: torch.Tensor | None, over: str) -> Trace:
    """Return the trace of several layers' logits (B, S, E), whose gates ask for one form of the balance loss."""
    trace = Trace()
    for place, logits in enumerate(layers):
        router = LinearRouter(2, logits.shape[-1], k, losses={over: 1.0})
        trace.add(str(place), routing_of(logits.requires_grad_(), k), mask, router)
    return trace


@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_of_a_model_is_that_of_transformers(n_experts, k, padded):
    """One function call over all layers, unevenly padded: values, and the gradient of every layer's logits."""
    layers = [torch.randn(3, 7, n_experts, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    mask = torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[0, 4:] = 0
        mask[2, 1:] = 0
    flat = tuple(logits.reshape(21, -1) for logits in layers)
    theirs = load_balancing_loss_func(flat, n_experts, k, mask if padded else None)
    wanted = torch.autograd.grad(theirs, layers)
    trace = traced(layers, k, mask.bool() if padded else None, "model_balance")
    ours = auxiliary_losses([trace])["model_balance"]
    assert_close(ours * k, theirs.double(), 3e-7)  # theirs counts in fp32
    for got, right in zip(torch.autograd.grad(ours * k, layers), wanted, strict=True):
        assert_close(got, right, 5e-6)  # small differences of theirs, in fp32
    by_layer = auxiliary_losses([traced(layers, k, mask.bool() if padded else None, "balance")])["balance"]
    one_by_one = [load_balancing_loss_func((x,), n_experts, k, mask if padded else None) for x in flat]
    assert_close(by_layer * k, torch.stack(one_by_one).mean().double(), 3e-7)
    assert abs(by_layer - ours) > 1e-3, "the two forms differ"


def test_the_balance_loss_of_a_model_weighs_layers_by_their_rows():
    """Layers of other sequences, as in an encoder-decoder: still one call on all rows; other sizes of E stay apart."""
    torch.manual_seed(2)
    long, short, wide = torch.randn(2, 9, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    trace = traced([long, short], 2, None, "model_balance")
    theirs = load_balancing_loss_func((long.reshape(18, 4), short.reshape(6, 4)), 4, 2)
    assert_close(2 * auxiliary_losses([trace])["model_balance"], theirs, 1e-6)
    three = traced([long, short, wide], 2, None, "model_balance")
    other = load_balancing_loss_func((wide.reshape(6, 6),), 6, 2)
    assert_close(2 * auxiliary_losses([three])["model_balance"], (2 * theirs + other) / 3, 1e-6)
    both = auxiliary_losses([trace, traced([short, short], 2, None, "model_balance")])["model_balance"]
    again = load_balancing_loss_func((short.reshape(6, 4),) * 2, 4, 2)
    assert_close(2 * both, (theirs + again) / 2, 1e-6)  # a mean over selections


def test_only_the_mean_over_layers_sees_layers_that_collapse_apart():
    first = torch.tensor([9.0, 9.0, -9.0, -9.0]).repeat(1, 8, 1)
    layers = [first, first.flip(-1)]
    assert abs(auxiliary_losses([traced(layers, 2, None, "model_balance")])["model_balance"] - 1) < 1e-6
    assert abs(auxiliary_losses([traced(layers, 2, None, "balance")])["balance"] - 2) < 1e-6


BALANCED = [name for name, recipe in RECIPES.items() if "balance" in recipe.__dataclass_fields__]


@pytest.mark.parametrize("router", BALANCED)
def test_every_recipe_with_a_balance_loss_offers_both_forms(router):
    options = {"n_experts": 4, "targets": "all-linear", **({"gate": "experts"} if router == "hydra" else {})}
    names = {}
    for over in ("layers", "model"):
        model = moa.build(models.llama(), router, balance=1.0, balance_over=over, **options)
        models.randomise(model).train()
        model(**models.lm_batch()).loss.backward()
        names[over] = {name for name in model.last_losses if "balance" in name}
        assert all(b.router.weight.grad.any() for _, b in model.branches() if hasattr(b.router, "weight"))
    assert names == {"layers": {"balance"}, "model": {"model_balance"}}
    with pytest.raises(ConfigError, match=r"unknown balance_over 'layer'.*layers"):
        moa.make_recipe(router, balance_over="layer", **options)


def test_the_recipes_with_a_balance_loss_are_known():
    assert set(BALANCED) == {"topk", "switch", "adamole", "mixlora", "hydra"}


@pytest.mark.parametrize("k", [1, 2, 4])
def test_balance_loss_is_one_when_uniform_and_grows_with_collapse(k):
    n_experts = 4
    uniform = torch.full((8, n_experts), 1 / n_experts, dtype=torch.float64)
    turning = (torch.arange(8)[:, None] + torch.arange(k)) % n_experts
    routing = Routing(torch.ones(8, k), turning, n_experts, scores=uniform)
    assert_close(balance_loss(routing), torch.tensor(1.0, dtype=torch.float64))
    collapsed = routing_of(torch.tensor([9.0, 6, 3, 0]).double().repeat(8, 1), k)
    assert balance_loss(collapsed) > (1.0 if k < n_experts else 1 - 1e-9)


def test_balance_loss_of_unnormalised_scores_is_per_row():
    """Sigmoid scores: a row of large scores must not outweigh the others."""
    scores = torch.tensor([[0.9, 0.9], [0.1, 0.01]], dtype=torch.float64)
    routing = Routing(scores[:, :1], torch.tensor([[0], [1]]), 2, scores=scores)
    p = scores / scores.sum(1, keepdim=True)
    assert_close(balance_loss(routing), 2 * (torch.tensor([0.5, 0.5]) * p.mean(0)).sum())


def test_z_loss():
    logits = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rows = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits[mask].tolist()]
    assert_close(z_loss(routing_of(logits, 2), mask), torch.tensor(sum(rows) / 3, dtype=torch.float64))
    assert_close(z_loss(routing_of(logits, 2)), logits.logsumexp(-1).square().mean())


def test_importance_and_load_losses():
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    routing = Routing(weights, None, 2, usage=weights.flip(-1))
    total = torch.tensor([2.5, 0.5], dtype=torch.float64)
    expected = total.var() / total.mean() ** 2
    assert_close(importance_loss(routing), expected, 1e-8)  # 1e-10 is added to the mean's square
    assert_close(load_loss(routing), expected, 1e-8)
    even = Routing(torch.full((4, 2), 0.5), None, 2)
    assert importance_loss(even) == 0
    assert importance_loss(Routing(torch.ones(4, 1), None, 1)) == 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_padding_changes_no_loss(name):
    router = LinearRouter(5, 4, 2, noisy=True).double().train()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    torch.manual_seed(7)
    r = router(x, Context())

    def padded(value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        junk = torch.zeros_like(value) if value.dtype == torch.int64 else torch.rand_like(value) * 9
        return torch.cat([value, junk[:, :2]], 1)

    wide = Routing(*(padded(v) for v in (r.weights, r.indices)), 4, *(padded(v) for v in (r.logits, r.scores)),
                   usage=padded(r.usage))  # fmt: skip
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    assert_close(LOSSES[name](wide, mask), LOSSES[name](r, None))
    with pytest.raises(AssertionError):  # and without the mask it does
        assert_close(LOSSES[name](wide, None), LOSSES[name](r, None))


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("rows", [(), (3, 1)])
def test_losses_of_constant_and_sequence_rows_are_scalars(name, rows):
    """Routings of fewer rows than the mask count every row."""
    logits = torch.randn(*rows, 4, requires_grad=True)
    routing = Routing(logits.softmax(-1), None, 4, logits, logits.softmax(-1), usage=logits.softmax(-1))
    value = LOSSES[name](routing, torch.ones(3, 7, dtype=torch.bool))
    assert value.shape == ()
    value.backward()
    assert bool(logits.grad.isfinite().all())


def test_all_rows_padded_is_zero_not_nan():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert bool(mean_of(masked_sums(torch.randn(2, 3, 4), mask)).isfinite().all())
    routing = routing_of(torch.randn(2, 3, 4), 2)
    assert balance_loss(routing, mask) == 0 and z_loss(routing, mask) == 0


def test_entropy():
    assert_close(entropy(torch.ones(2, 8, dtype=torch.float64)), torch.full((2,), math.log(8), dtype=torch.float64))
    assert_close(entropy(torch.tensor([[1.0, 0, 0]])), torch.zeros(1))


@pytest.mark.parametrize(("loss", "words"), [(balance_loss, "scores"), (z_loss, "logits"), (load_loss, "noisy")])
def test_a_loss_without_what_it_needs(loss, words):
    with pytest.raises(ContextError, match=words):
        loss(Routing(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64), 3))


def test_rloo_is_the_leave_one_out_form():
    losses = torch.randn(5, 3, dtype=torch.float64)
    log_probs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rloo(losses, log_probs).backward()
    for m in range(5):
        for b in range(3):
            others = [losses[j, b] for j in range(5) if j != m]
            assert_close(log_probs.grad[m, b], (losses[m, b] - sum(others) / 4) / 5)


def test_rloo_of_equal_losses_is_exactly_zero():
    log_probs = torch.randn(3, 50, requires_grad=True)
    rloo(torch.rand(50).expand(3, -1), log_probs).backward()
    assert not log_probs.grad.any()


def test_rloo_bad_input():
    ones = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(ConfigError, match="at least 2"):
        rloo(torch.ones(1, 3), torch.ones(1, 3, requires_grad=True))
    with pytest.raises(ShapeError, match=r"\(2, 2\)"):
        rloo(torch.ones(2, 2), ones)
    with pytest.raises(ContextError, match="use_reentrant"):
        rloo(torch.ones(2, 3), ones.detach())


def test_example_losses_sum_to_the_mean_over_labelled_tokens():
    logits, labels = torch.randn(3, 6, 9), torch.randint(9, (3, 6))
    labels[0, :4] = -100
    labels[2] = -100
    shifted = example_losses(logits, labels, shift=True)
    assert_close(shifted.sum(), F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), 1e-6)
    assert shifted[2] == 0
    aligned = example_losses(logits, labels, shift=False)
    assert_close(aligned.sum(), F.cross_entropy(logits.flatten(0, 1), labels.flatten()), 1e-6)
    single = example_losses(logits[:, 0], labels[:, 5], shift=False)
    assert_close(single.sum(), F.cross_entropy(logits[:, 0], labels[:, 5]), 1e-6)


def test_example_losses_of_what_are_no_class_ids():
    assert example_losses(torch.randn(3, 2), torch.randn(3), shift=False) is None
    assert example_losses(torch.randn(3, 1), torch.randint(5, (3, 2)), shift=False) is None
    assert example_losses(torch.randn(3, 4), torch.randint(4, (3,)), shift=True) is None
