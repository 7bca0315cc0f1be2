"""ReMix: the sampler, the estimator against the exact gradient, what it may reach.

Run: pytest tests/model/test_remix_training.py
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import moa
from moa.errors import ConfigError, ContextError
from moa.objective.losses import rloo
from moa.objective.objective import Objective, rule_of
from moa.recipes import make_recipe
from moa.routers import SampledRouter
from moa.routers.sampled import plackett_luce
from moa.types import Context, Routing
from tests import models
from tests.laws import assert_close


def ordered(n_experts: int, k: int) -> torch.Tensor:
    """Return every ordered choice of k of E, (P, k)."""
    return torch.tensor(list(itertools.permutations(range(n_experts), k)))


# ------------------------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize(("n_experts", "k"), [(5, 1), (5, 2), (4, 3), (3, 3), (1, 1)])
def test_probabilities_of_all_ordered_subsets_sum_to_one(n_experts, k):
    logits = torch.randn(n_experts, dtype=torch.float64) * 3
    choices = ordered(n_experts, k)
    log_q = plackett_luce(logits.expand(len(choices), -1), choices)
    assert abs(log_q.exp().sum().item() - 1) < 1e-12


def test_log_probability_is_the_papers_formula():
    q = torch.randn(6, dtype=torch.float64).softmax(0)
    for choice in ordered(6, 3)[::7]:
        left, expected = 1.0, 0.0
        for i in choice.tolist():
            expected += math.log(q[i] / left)
            left -= q[i].item()
        assert_close(plackett_luce(q.log(), choice), torch.tensor(expected, dtype=torch.float64))


def test_gradient_of_the_log_probability_is_the_papers():
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    choice = torch.tensor([3, 0])
    plackett_luce(logits, choice).backward()
    q = logits.detach().softmax(0)
    first = F.one_hot(choice[0], 5) - q
    rest = q.clone()
    rest[3] = 0
    assert_close(logits.grad, first + F.one_hot(choice[1], 5) - rest / rest.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confident_router_stays_finite(dtype):
    """1 − q rounds to zero here: a formula with 1 − cumsum overflows."""
    logits = torch.tensor([200.0, 0.0, -3.0, -200.0], dtype=dtype, requires_grad=True)
    log_q = plackett_luce(logits.expand(12, -1), ordered(4, 2))
    assert bool(log_q.isfinite().all())
    exact = (0 - torch.tensor([0.0, -3.0, -200.0]).double().logsumexp(0)).item()  # given 0 first, q_1 of the rest
    assert abs(log_q[0].item() - exact) < 1e-6
    log_q.sum().backward()
    assert bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("k", [1, 2])
def test_the_sampler_draws_from_that_distribution(k):
    n = 40_000
    router = SampledRouter(1, 4, k).double().train()
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0], [0.2], [-0.5], [0.0]]))
    routing = router(torch.ones(n, 1, dtype=torch.float64), Context())
    choices = ordered(4, k)
    counts = (routing.indices[:, None] == choices).all(-1).sum(0)
    expected = plackett_luce(router.weight.detach().T.expand(len(choices), -1), choices).exp() * n
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(choices) - 1
    assert counts.sum() == n and chi_squared < freedom + 5 * (2 * freedom) ** 0.5
    assert_close(routing.log_prob, plackett_luce(routing.logits, routing.indices))


def test_rows_draw_independently_and_weights_are_one():
    router = SampledRouter(4, 6, 2).train()
    routing = router(torch.zeros(2, 300, 4), Context())
    assert len({tuple(sorted(row)) for row in routing.indices[0].tolist()}) == 15
    assert not torch.equal(routing.indices[0], routing.indices[1])
    assert torch.equal(routing.weights, torch.ones(2, 300, 2))
    one = SampledRouter(4, 6, 2, granularity="sequence").train()(torch.zeros(2, 300, 4), Context())
    assert one.indices.shape == (2, 1, 2) and one.log_prob.shape == (2, 1)


def test_inference_takes_the_top_k_without_noise():
    router = SampledRouter(4, 6, 2).eval()
    x = torch.randn(3, 5, 4)
    routing = router(x, Context())
    assert torch.equal(routing.indices, (x @ router.weight.T).topk(2, -1).indices)
    assert routing.log_prob is None


# ------------------------------------------------------------------------------------------------ the estimator


class TwoLayers(nn.Module):
    """y = W2 relu(W1 x): small enough to enumerate every selection."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, labels=None):
        logits = self.two(torch.relu(self.one(x)))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def tiny(samples: int = 2) -> moa.MoAModel:
    """Return two mixtures of 3 experts, 2 active, with experts and routers drawn at random, in fp64."""
    torch.manual_seed(1)
    recipe = make_recipe("remix", n_experts=3, k=2, rank=1, targets=("one", "two"), samples=samples)
    return models.randomise(moa.build(TwoLayers(), recipe).double(), scale=0.8)


class Forced:
    """Make the sampled routers take given choices (rows, k), one list entry after the other."""

    def __init__(self, model: moa.MoAModel, choices: list[torch.Tensor]) -> None:
        for (_, branch), choice in zip(model.branches(), choices, strict=True):
            branch.router._decide = self.decide(branch.router, choice)

    @staticmethod
    def decide(router, choice):
        def forced(x, draw):
            logits = F.linear(x, router.weight)
            weights = torch.ones_like(choice, dtype=logits.dtype)
            return Routing(weights, choice, 3, logits, logits.softmax(-1), plackett_luce(logits, choice))

        return forced


def test_the_estimators_mean_is_the_exact_gradient():
    """Every pair of selections of the whole network, weighted by its probability: no Monte Carlo anywhere.

    The exact gradient is that of Σ_J Q(J) L(J), differentiated through Q; the estimator sees M = 2 selections.
    """
    model = tiny()
    x, label = torch.randn(1, 3, dtype=torch.float64), torch.tensor([1])
    routers = [branch.router.weight for _, branch in model.branches()]
    subsets = ordered(3, 2)
    losses, log_qs = [], []
    for one, two in itertools.product(subsets, subsets):
        Forced(model, [one[None], two[None]])
        with model.tracing() as trace:
            losses.append(model.base(x, label)["loss"])
        log_qs.append(sum(record.routing.log_prob.sum() for record in trace))
    loss, log_q = torch.stack(losses).detach(), torch.stack(log_qs)
    n = len(loss)
    assert n == 36 and abs(log_q.exp().sum().item() - 1) < 1e-12

    exact = torch.autograd.grad((log_q.exp() * loss).sum(), routers, retain_graph=True)
    q = log_q.exp().detach()
    surrogate = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(n), range(n)):
        pair = rloo(torch.stack([loss[a], loss[b]])[:, None], torch.stack([log_q[a], log_q[b]])[:, None])
        surrogate = surrogate + q[a] * q[b] * pair
    for got, expected in zip(torch.autograd.grad(surrogate, routers), exact, strict=True):
        assert expected.abs().max() > 1e-3
        assert_close(got, expected)


def test_one_training_forward_is_one_draw_of_that_estimator():
    """The model's own loss, with its selections known, has the gradient written out by hand, example by example."""
    model = tiny(samples=4).train()
    x, labels = torch.randn(3, 3, dtype=torch.float64), torch.tensor([1, 0, 1])
    traces = []
    model.observers.append(traces.extend)
    out = model(x=x, labels=labels)
    out["loss"].backward(retain_graph=True)
    assert len(traces) == 4
    parts = []
    for trace in traces:
        # replay the selection to get each example's loss; the choices are fixed, so the experts' part is plain
        Forced(model, [record.routing.indices for record in trace])
        with model.tracing():
            logits = model.base(x)
        parts.append(F.cross_entropy(logits, labels, reduction="none"))
    losses = torch.stack(parts)  # (M, B)
    advantage = (losses - losses.mean(0)).detach() / 3 / 3  # / (M - 1), and an example's share of the mean is 1/3
    for layer, (_, branch) in enumerate(model.branches()):
        log_q = torch.stack([list(trace)[layer].routing.log_prob for trace in traces])
        (expected,) = torch.autograd.grad((advantage * log_q).sum(), branch.router.weight, retain_graph=True)
        assert expected.abs().max() > 1e-4
        assert_close(branch.router.weight.grad, expected)
    experts = [p for _, branch in model.branches() for p in branch.bank.parameters()]
    for got, expected in zip(experts, torch.autograd.grad(losses.mean(), experts), strict=True):
        assert_close(got.grad, expected)


def test_the_policy_term_never_reaches_the_experts():
    """Not even those of earlier layers, whose output the later routers look at."""
    model = models.randomise(moa.build(models.llama(), "remix", n_experts=4, k=2, rank=2)).train()
    batch = models.lm_batch()
    seen = []
    model.observers.append(seen.extend)
    model(**batch)
    log_q = sum(record.routing.log_prob.sum() for trace in seen for record in trace)
    experts = [p for _, branch in model.branches() for p in branch.bank.parameters()]
    routers = [p for _, branch in model.branches() for p in branch.router.parameters()]
    assert all(g is None for g in torch.autograd.grad(log_q, experts, allow_unused=True, retain_graph=True))
    assert all(bool(g.any()) for g in torch.autograd.grad(log_q, routers))


def test_the_task_loss_never_reaches_the_router():
    model = models.randomise(moa.build(models.llama(), "remix", n_experts=4, k=2, rank=2)).train()
    with model.tracing():
        loss = model.base(**models.lm_batch()).loss
    routers = [p for _, branch in model.branches() for p in branch.router.parameters()]
    assert all(g is None for g in torch.autograd.grad(loss, routers, allow_unused=True))


def test_the_router_learns_which_expert_is_good():
    """A bandit: expert 2 alone lowers the loss; its probability must go up."""
    torch.manual_seed(0)
    base = nn.Linear(2, 2, bias=False).double()
    model = (
        moa.build(nn.Sequential(base), "remix", n_experts=4, k=1, rank=1, targets=("0",), samples=4).double().train()
    )
    ((_, branch),) = model.branches()
    with torch.no_grad():
        base.weight.zero_()
        branch.bank.down.fill_(1.0)
        branch.bank.up.zero_()
        branch.bank.up[2] = 1.0 / branch.bank.scaling
        branch.router.weight.zero_()
    x = torch.ones(16, 2, dtype=torch.float64)
    optimizer = torch.optim.SGD(branch.router.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        model.routed_loss(lambda: (model(x) - 2).square().mean(-1)).backward()
        optimizer.step()
    assert F.linear(x[:1], branch.router.weight).softmax(-1)[0, 2] > 0.9


# ------------------------------------------------------------------------------------------------ ω, M, names


@pytest.mark.parametrize(("scale", "alpha", "omega"), [("lora", None, 2 / 12), ("rslora", None, 2 / 12**0.5),
                                                       ("lora", 8, 8 / 12), ("rslora", 8, 8 / 12**0.5)])  # fmt: skip
def test_omega_is_constant(scale, alpha, omega):
    recipe = make_recipe("remix", n_experts=5, k=3, rank=4, scale=scale, alpha=alpha, targets=("up",))
    model = models.randomise(moa.build(models.plain(), recipe)).double()
    ((_, branch),) = model.branches()
    x = torch.randn(7, models.WIDTH, dtype=torch.float64)
    for training in (True, False):
        routing = branch.router.train(training)(x, model.context)
        got = branch.bank(x, routing)
        for row, chosen in enumerate(routing.indices.tolist()):
            plain = sum(x[row] @ branch.bank.down[e].T @ branch.bank.up[e] for e in chosen)
            assert_close(got[row], omega * plain)


@pytest.mark.parametrize("samples", [1, 0, -3])
def test_fewer_than_two_samples_are_refused(samples):
    with pytest.raises(ConfigError, match=f"at least 2, got {samples}"):
        moa.build(models.llama(), "remix", samples=samples)


@pytest.mark.parametrize("options", [{"granularity": "word"}, {"scale": "big"}])
def test_options_are_checked(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make_recipe("remix", **options)


def test_the_whole_network_is_selected_m_times():
    model = moa.build(models.llama(), "remix", n_experts=4, samples=3).train()
    seen = []
    model.observers.append(seen.extend)
    model(**models.lm_batch())
    assert len(seen) == 3 and all(len(trace) == len(model.mixtures()) for trace in seen)
    assert set(model.last_losses) == {"task", "policy"}
    model.eval()
    model(**models.lm_batch())
    assert len(seen) == 3


# ------------------------------------------------------------------------------------------------ per example


RULES = {
    "llama": ("llama", {}, "shifted"),
    "gpt2": ("gpt2", {}, "shifted"),
    "bert": ("bert", {}, "aligned"),
    "t5": ("t5", {}, "aligned"),
    "vit": ("vit", {}, "aligned"),
}


@pytest.mark.parametrize("kind", list(RULES))
def test_per_example_losses_are_found(kind):
    make, make_batch = models.MODELS[kind]
    model = moa.build(make(), "remix", n_experts=4, targets="all-linear").train()
    batch = make_batch()
    out = model(**batch)
    assert model.objective.per_example_rule == RULES[kind][2]
    rows = model.objective.per_example([out.loss], [out.logits], batch["labels"])
    assert rows.shape == (1, 4)
    assert not bool(torch.isclose(rows[0, 0], rows[0, 1]))


@pytest.mark.parametrize("kind", list(RULES))
@pytest.mark.parametrize("size", [0.0, 1e-4], ids=["uniform", "nearly uniform"])
def test_the_rule_is_not_guessed_from_logits(kind, size):
    """Logits that are (nearly) uniform give both rules the same loss; the rule is found all the same."""
    make, make_batch = models.MODELS[kind]
    model = moa.build(make(), "remix", n_experts=4, targets="all-linear").train()
    head = model.get_output_embeddings() or model.base.classifier
    with torch.no_grad():
        for p in head.parameters():
            p.mul_(size)
        if size:
            assert head.weight.abs().max() > 0
    model(**make_batch())
    assert model.objective.per_example_rule == RULES[kind][2]


@pytest.mark.parametrize("kind", list(RULES))
def test_a_hook_that_hands_out_copies_hides_no_rule(kind):
    """DeepSpeed and full backward hooks put one on every module: the logits handed out are not those of the loss."""
    make, make_batch = models.MODELS[kind]
    model = moa.build(make(), "remix", n_experts=4, targets="all-linear").train()

    def copied(module, args, outputs):
        outputs["logits"], outputs["loss"] = outputs["logits"].clone(), outputs["loss"].clone()

    model.base.register_forward_hook(copied)
    model(**make_batch())
    assert model.objective.per_example_rule == RULES[kind][2]


def test_a_step_that_the_rule_does_not_give_counts_as_a_batch():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    objective = Objective()
    objective.per_example_rule = "aligned"
    weighted = F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0, 0.2]))
    rows = objective.per_example([weighted] * 2, [logits] * 2, labels)
    assert torch.equal(rows, weighted.expand(2, 4))


def test_class_weights_are_not_taken_for_plain_cross_entropy():
    """With uniform logits their losses are equal, too."""
    logits, labels = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    weighted = F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0, 0.2]))
    assert torch.isclose(weighted, F.cross_entropy(logits, labels))
    assert rule_of(weighted, logits, labels) == "none"
    assert rule_of(F.cross_entropy(logits, labels), logits, labels) == "aligned"
    assert rule_of(F.cross_entropy(logits, torch.full((4,), -100)), logits, torch.full((4,), -100)) is None


def test_a_loss_of_something_before_the_logits_has_no_rule():
    x, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    assert rule_of(F.cross_entropy(x, labels), (x @ torch.randn(3, 5)).clone(), labels) == "none"


def test_the_policy_term_needs_no_exchange(monkeypatch):
    """Advantages are each example's own: nothing of a ReMix step is added up over processes."""
    seen = []
    monkeypatch.setattr("moa.objective.objective.over_processes", lambda values: seen.append(len(values)) or values)
    moa.build(models.llama(), "remix", n_experts=4).train()(**models.lm_batch()).loss.backward()
    assert seen == [0]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({"num_labels": 1, "problem_type": "regression"}, torch.randn(4)),
        ({"num_labels": 1}, torch.tensor([0, 3, 5, 1])),  # transformers makes a regression of it
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.rand(4, 3).round()),
    ],
    ids=["regression", "integer regression", "multi-label"],
)
def test_other_losses_fall_back_to_the_batch(options, labels):
    model = models.randomise(moa.build(models.bert(**options), "remix", n_experts=4, targets="all-linear")).train()
    loss = model(**{**models.class_batch(), "labels": labels}).loss
    loss.backward()
    assert model.objective.per_example_rule in ("none", None)
    assert all(bool(b.router.weight.grad.any()) for _, b in model.branches())


def test_a_model_with_outputs_of_its_own_falls_back_to_the_batch():
    model = models.randomise(moa.build(models.plain(), "remix", n_experts=4, targets="all-linear")).train()
    loss, logits = model(**models.plain_batch())
    assert logits.shape == (4, 3)
    loss.backward()
    assert all(bool(b.router.weight.grad.any()) for _, b in model.branches())


def test_a_custom_loss_that_looks_alike_is_not_taken_for_cross_entropy():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    objective = Objective()
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.1)
    assert objective.per_example([smoothed] * 2, [logits] * 2, labels) is None
    assert objective.per_example_rule == "none"


def test_training_on_a_loss_from_outside_is_refused_when_it_learns():
    model = models.randomise(moa.build(models.llama(), "remix", n_experts=4)).train()
    batch = models.lm_batch()
    batch.pop("labels")
    for outputs in (model(**batch), model.model(**batch)):  # a look at them is free
        with pytest.raises(ContextError, match="routed_loss"):
            outputs[0].square().mean().backward()
    model.zero_grad()
    loss = model.routed_loss(lambda: model(**batch).logits.square().mean((1, 2)))
    loss.backward()
    assert all(bool(b.router.weight.grad.any()) for _, b in model.branches())
    model.eval()
    assert model(**batch).logits.shape[0] == 4


def test_a_training_forward_without_a_loss_runs_one_selection_drawn_as_in_training():
    model = models.randomise(moa.build(models.llama(), "remix", n_experts=4)).train()
    batch = models.lm_batch()
    batch.pop("labels")
    calls, seen = [], []
    model.base.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.observers.append(seen.extend)
    first, other = (model(**batch).logits for _ in range(2))
    assert len(calls) == len(seen) == 2 and not torch.equal(first, other)
    assert all(len(trace) and all(r.routing.log_prob is not None for r in trace) for trace in seen)


def test_reentrant_checkpointing_behind_our_back_raises():
    """Switched on in the base itself: the log-probability has no gradient, and the routers would not learn."""
    model = moa.build(models.llama(), "remix", n_experts=4).train()
    model.base.enable_input_require_grads()
    model._newer_name("gradient_checkpointing_enable")({"use_reentrant": True})
    with pytest.raises(ContextError, match="use_reentrant"):
        model(**models.lm_batch())


# ------------------------------------------------------------------------------------------------ sequence routing


def test_training_looks_at_the_prompt_alone():
    """What comes after the first label must not reach a sequence-level routing: at inference it is not there yet."""
    model = models.randomise(moa.build(models.llama(), "remix", n_experts=6, granularity="sequence")).train()
    first, prompt = next(iter(model.mixtures())), 3
    batch = models.lm_batch(prompt=prompt)

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), model.tracing() as trace:
            model(**{**batch, "input_ids": ids})
        return next(r for r in trace if r.name == first).routing.logits

    before = logits(batch["input_ids"])
    answer = batch["input_ids"].clone()
    answer[:, prompt:] = (answer[:, prompt:] + 5) % models.VOCAB
    assert torch.equal(logits(answer), before)
    question = batch["input_ids"].clone()
    question[:, 1] = (question[:, 1] + 5) % models.VOCAB
    assert not torch.equal(logits(question), before)


def test_a_fully_labelled_row_looks_at_its_first_token():
    batch = models.lm_batch(prompt=0)
    model = moa.build(models.llama(), "remix", n_experts=4, granularity="sequence").train()
    seen = []
    model.observers.append(lambda _: seen.extend(model.context.routing_masks))
    model(**batch)
    (mask,) = seen
    assert mask.sum(1).tolist() == [1, 1, 1, 1] and bool(mask[:, 0].all())


def test_left_padding_does_not_reach_a_sequence_routing():
    model = models.randomise(moa.build(models.llama(), "remix", n_experts=6, granularity="sequence")).eval()
    prompt = torch.randint(2, models.VOCAB, (1, 4))
    padded = torch.cat([torch.full((1, 3), 7), prompt], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=prompt).logits
        got = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    assert_close(got, alone, 1e-4)


def test_encoders_pool_over_the_attention_mask():
    """Padding columns change nothing, pooled or not."""
    for granularity in ("token", "sequence"):
        targets = r".*(intermediate|output)\.dense"
        recipe = make_recipe("remix", n_experts=6, granularity=granularity, targets=targets)
        model = models.randomise(moa.build(models.bert(), recipe)).eval()
        batch = models.class_batch()
        wide = {k: F.pad(batch[k], (0, 3), value=v) for k, v in (("input_ids", 5), ("attention_mask", 0))}
        with torch.no_grad():
            batch.pop("labels")
            assert_close(model(**wide).logits, model(**batch).logits, 1e-5)
