"""One LoRA from a routed mixture: closed form, gradient steps, the gap.

Run: pytest tests/training/test_distill.py
"""

from __future__ import annotations

import itertools

import pytest
import torch

import moa
from moa.errors import ConfigError, ContextError, FoldError, NumericsError
from moa.folding.mean_routing import mean_routings
from moa.merge import Dense, squeeze
from tests import models
from tests.laws import assert_close


def build(kind: str = "llama", router: str = "topk", **options) -> moa.MoAModel:
    if router != "hydra":
        options = {"n_experts": 3, **options}
    model = moa.build(models.MODELS[kind][0](), router, **{"rank": 2, "modules_to_save": [], **options})
    return models.randomise(model).double().eval()


def batch_of(kind: str, **options) -> dict[str, torch.Tensor]:
    batch = models.MODELS[kind][1](**options)
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def delta_of(student: moa.MoAModel, layer: str) -> torch.Tensor:
    return student.mixtures()[layer].branches[0].bank.delta(0).dense()


@pytest.mark.parametrize("kind", list(models.MODELS))
def test_constant_gates_give_the_mixture_itself_which_is_the_fold(kind):
    model, batch = build(kind, "fixed"), batch_of(kind)
    before = models.outputs_of(model, batch)
    done = moa.distill(model, 6)
    assert done.exact and not done.losses and not done.divergences
    assert_close(models.outputs_of(done.model, batch), before)
    assert_close(models.outputs_of(done.model.merge_and_unload(), batch), before)
    assert_close(models.outputs_of(model.merge_and_unload(), batch), before)


def test_a_lower_rank_gives_the_truncated_svd_of_the_weighted_sum():
    model = build("plain", "fixed", targets=["up"])
    (mixture,) = model.mixtures().values()
    mixture.branches[0].router.weights.copy_(torch.tensor([2.0, -1.0, 0.5]))
    bank = mixture.branches[0].bank
    whole = 2 * bank.delta(0).dense() - bank.delta(1).dense() + 0.5 * bank.delta(2).dense()
    done = moa.distill(model, 3)
    best = squeeze(Dense(whole.detach()), 3)
    assert_close(delta_of(done.model, "up"), best.delta.dense(), 1e-9)
    assert done.errors["up"] == pytest.approx(best.relative, rel=1e-9)
    assert done.errors["up"] > 0.01 and not done.exact


def test_rows_of_the_rank_that_the_change_does_not_need_can_still_learn():
    done = moa.distill(build("plain", "fixed", targets=["up"]), 9)
    bank = done.model.mixtures()["up"].branches[0].bank
    assert bank.down[0, 6:].abs().min() > 0 and bank.up[0, 6:].abs().max() == 0


@pytest.mark.parametrize("router", ["topk", "dense", "sigmoid", "switch"])
def test_token_routings_are_averaged_over_real_tokens(router):
    model = build(router=router, **({"k": 2} if router in ("topk", "sigmoid") else {}))
    data = [batch_of("llama", seed=1), batch_of("llama", rows=3, length=6, seed=2)]
    sums, count = 0.0, 0
    name = "model.layers.1.mlp.up_proj"
    for batch in data:
        with torch.no_grad(), model.tracing() as trace:
            model(**batch)
        (routing,) = [r.routing for r in trace if r.name == name]
        real = batch["attention_mask"].bool()
        sums, count = sums + routing.dense()[real].double().sum(0), count + int(real.sum())
    assert count < sum(b["input_ids"].numel() for b in data)
    bank = model.mixtures()[name].branches[0].bank
    expected = sum(w * bank.delta(e).dense() for e, w in enumerate(sums / count))
    assert_close(delta_of(moa.distill(model, 6, data).model, name), expected, 1e-9)


def test_without_a_mask_every_row_counts():
    model = build("plain", targets=["up"], k=1)
    batch = batch_of("plain", rows=5)
    with torch.no_grad(), model.tracing() as trace:
        model(**batch)
    expected = trace.records[0].routing.dense().double().mean(0)
    (mean,) = mean_routings(model, [batch]).values()
    assert_close(mean.weights, expected)
    assert float(mean.chosen.sum()) == pytest.approx(1)


def test_a_routing_per_sequence_counts_once_per_token():
    model = build(router="remix", k=1, granularity="sequence")
    batch = batch_of("llama")
    with torch.no_grad(), model.tracing() as trace:
        model(**batch)
    name = trace.records[0].name
    weights = trace.records[0].routing.dense().double()
    assert weights.shape[1] == 1
    tokens = batch["attention_mask"].double().sum(1)
    expected = (weights[:, 0] * tokens[:, None]).sum(0) / tokens.sum()
    (mean,) = [m for (layer, _), m in mean_routings(model, [batch]).items() if layer == name]
    assert_close(mean.weights, expected)
    assert not mean.constant


def test_routings_by_task():
    model = build(router="poly", n_tasks=2)
    batch = batch_of("llama")
    with pytest.raises(ConfigError, match=r"q_proj: its routing depends on the input.*data=.*task_id="):
        moa.distill(model, 2)
    for task in (0, 1):
        done = moa.distill(model, 2, task_id=task)
        assert done.exact
        own = {**batch, "task_ids": torch.full((4,), task)}
        assert_close(models.outputs_of(done.model, batch), models.outputs_of(model, own))
    with pytest.raises(ContextError, match="task ids"):
        moa.distill(model, 2, [batch])
    mixed = {**batch, "task_ids": torch.tensor([0, 1, 0, 0])}
    router = next(b.router for _, b in model.branches())
    tokens = batch["attention_mask"].double().sum(1)
    share = torch.stack([tokens[[0, 2, 3]].sum(), tokens[1]]) / tokens.sum()
    expected = sum(share[t] * router.constant(t).dense().double() for t in (0, 1))
    assert_close(next(iter(mean_routings(model, [mixed]).values())).weights, expected)


def test_heads_are_averaged_each_for_itself():
    model = build(router="mhr", n_tasks=2, n_heads=2)
    batch = {**batch_of("llama"), "task_ids": torch.zeros(4, dtype=torch.long)}
    mean = next(iter(mean_routings(model, [batch]).values()))
    assert_close(mean.weights, next(b.router for _, b in model.branches()).constant(0).dense().double())
    assert mean.weights.shape == (2, 3)
    assert_close(
        models.outputs_of(moa.distill(model, 2, [batch]).model, batch_of("llama")), models.outputs_of(model, batch)
    )


def test_flylora_keeps_each_direction_by_how_often_it_is_chosen():
    batch = batch_of("llama")
    everything = build(router="flylora", n_experts=4, rank=4, k=4)
    done = moa.distill(everything, 4, [batch])
    assert_close(models.outputs_of(done.model, batch), models.outputs_of(everything, batch))
    model = build(router="flylora", n_experts=4, rank=4, k=2)
    name, branch = next(iter(model.branches()))
    with torch.no_grad(), model.tracing() as trace:
        model(**batch)
    real = batch["attention_mask"].bool()
    share = trace.records[0].routing.selected()[real].double().mean(0)
    expected = (branch.bank.up * share[:, None]).T @ branch.router.projection * branch.bank.scaling
    assert_close(delta_of(moa.distill(model, 4, [batch]).model, name), expected, 1e-9)


@pytest.mark.parametrize("gate", [None, "experts"])
def test_branches_on_the_output_go_through_the_base(gate):
    options = {"n_experts": 3, "k": 3} if gate else {}
    model = build(router="hydra", gate=gate, targets=["down_proj"], sequential_rank=1, **options)
    batch = batch_of("llama")
    done = moa.distill(model, 9, [batch])
    assert done.exact is (gate is None)
    if gate is None:
        assert_close(models.outputs_of(done.model, batch), models.outputs_of(model, batch))
    else:
        assert 0 < done.divergences["closed form"] < 0.1


@pytest.mark.parametrize("options", [{"kind": "bert"}, {"biases": True}], ids=["base-bias", "expert-bias"])
def test_a_constant_is_refused(options):
    model = build(**{"router": "hydra", "targets": "all-linear", **options})
    for name, parameter in model.named_parameters():
        if name.endswith("base.bias"):  # transformers starts them at zero
            torch.nn.init.ones_(parameter)
    with pytest.raises(FoldError, match=r"(q_proj|query).*add a constant.*fold the mixture"):
        moa.distill(model, 8)


def test_the_layers_of_a_routed_block_share_its_routing():
    model = build(router="mixlora", k=1, dropout=0.0)
    batch = batch_of("llama")
    with torch.no_grad(), model.tracing() as trace:
        model(**batch)
    leader = next(r for r in trace if "layers.0.mlp" in r.name)
    weights = leader.routing.dense()[batch["attention_mask"].bool()].double().mean(0)
    done = moa.distill(model, 6, [batch])
    for layer in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.{layer}"
        bank = model.mixtures()[name].branches[0].bank
        assert_close(delta_of(done.model, name), sum(w * bank.delta(e).dense() for e, w in enumerate(weights)), 1e-9)


@pytest.mark.parametrize("objective", ["kl", "mse"])
def test_gradient_steps_come_closer_and_change_neither_mixture_nor_base(objective):
    model = build(k=1).train()
    data = [batch_of("llama", seed=seed) for seed in range(2)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = moa.distill(model, 6, data, steps=20, lr=3e-3, objective=objective)
    assert done.divergences["refined"] < 0.8 * done.divergences["closed form"]
    assert set(done.losses) == {"mixture", "closed form", "refined"}
    assert model.training and not done.model.training
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert next(model.base.parameters()) is next(done.model.base.parameters())
    lines = done.summary().splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["mixture", "closed", "refined"]
    assert f"{done.losses['refined'] - done.losses['mixture']:+.4f}" in lines[-1]


def test_losses_are_means_over_labels_however_they_are_cut_into_batches():
    model = build(k=1)
    whole = batch_of("llama", rows=4)
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    cut, uncut = moa.distill(model, 2, parts), moa.distill(model, 2, [whole])
    with torch.no_grad():
        assert uncut.losses["mixture"] == pytest.approx(float(model(**whole).loss), rel=1e-12)
        assert uncut.losses["closed form"] == pytest.approx(float(uncut.model(**whole).loss), rel=1e-12)
        logits = [m(**whole).logits.log_softmax(-1)[whole["attention_mask"].bool()] for m in (model, uncut.model)]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert uncut.divergences["closed form"] == pytest.approx(float(kl), rel=1e-9)
    for stage in ("mixture", "closed form"):
        assert cut.losses[stage] == pytest.approx(uncut.losses[stage], rel=1e-7)  # transformers' loss is in fp32
    unlabelled = {key: value for key, value in whole.items() if key != "labels"}
    done = moa.distill(model, 2, [unlabelled])
    assert not done.losses and done.divergences == pytest.approx(uncut.divergences, rel=1e-9)
    assert "-" in done.summary().splitlines()[-1]


def test_a_head_trained_whole_goes_along_as_a_copy():
    model = models.randomise(moa.build(models.bert(), "dense", n_experts=3, rank=2)).double().eval()
    batch = batch_of("bert")
    done = moa.distill(model, 6, [batch], steps=2)
    assert done.model.modules_to_save == ["classifier"]
    ours, theirs = done.model.base.classifier.weight, model.base.classifier.weight
    assert torch.equal(ours, theirs) and ours is not theirs and theirs.requires_grad
    assert done.losses["mixture"] == pytest.approx(float(model(**batch).loss.detach()), rel=1e-12)


def test_the_result_saves_loads_and_keeps_its_logits(tmp_path):
    model, batch = build(k=1), batch_of("llama")
    done = moa.distill(model, 4, [batch])
    done.model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, models.llama().double())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(done.model, batch))


def test_exact_results_take_no_steps():
    batch = batch_of("llama")
    done = moa.distill(build(router="fixed"), 6, [batch], steps=3)
    assert set(done.divergences) == {"closed form"} and abs(done.divergences["closed form"]) < 1e-12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ConfigError, "rank must be at least 1, got 0"),
        ({"objective": "kll"}, ConfigError, "Did you mean 'kl'"),
        ({"data": None, "steps": 1}, ConfigError, "need data"),
        ({"data": itertools.repeat({})}, ConfigError, "an iterator, which can be gone through once"),
        ({"data": []}, ConfigError, "holds no batch"),
        ({"data": None}, ConfigError, "averaged over data"),
        ({"steps": 3, "lr": 1e300}, NumericsError, "at step 1: lower lr"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        moa.distill(build(), **{"rank": 2, "data": [batch_of("llama")], **options})


def test_what_cannot_be_distilled():
    batch = batch_of("llama")
    with pytest.raises(FoldError, match=r"q_proj: soft slots mix the rows"):
        moa.distill(build(router="soft"), 2, [batch])
    streams = moa.build(models.llama(), moa.make_recipe("xcross", n_experts=2, rank=2))
    with pytest.raises(FoldError, match="several streams"):
        moa.distill(streams, 2, [batch])
    unloaded = build(router="fixed")
    unloaded.unload()
    with pytest.raises(ConfigError, match="no mixtures"):
        moa.distill(unloaded, 2)
    with pytest.raises(ConfigError, match="no row of the data reached"):
        moa.distill(build(), 2, [{**batch, "attention_mask": torch.zeros(4, 8, dtype=torch.long)}])
