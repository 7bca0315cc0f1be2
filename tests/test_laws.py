"""The laws over everything registered: ROUTERS, BANKS, RECIPES. Run: pytest tests/test_laws.py"""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, ContextError, FoldError, ShapeError
from moa.experts import FAMILIES, LoRABank
from moa.experts.factored import FusedFactors
from moa.mixture.blocks import FollowRouter
from moa.mixture.mixture import Mixture
from moa.monitor.statistics import RoutingStatistics
from moa.recipes import RECIPES, Site
from moa.routers import ROUTERS

from . import laws, models
from .laws import assert_close

few = settings(max_examples=12, deadline=None, derandomize=True)
routers = laws.parametrize(laws.ROUTER_CASES)
banks = laws.parametrize(laws.BANK_CASES)
recipes = laws.parametrize(laws.RECIPE_CASES)


@st.composite
def bank_sizes(draw: Any) -> dict[str, int]:
    """Draw sizes: no rows at all, one expert, k = E, and features that are no multiple of anything."""
    n_experts = draw(st.integers(1, 5))
    return {
        "rows": draw(st.sampled_from([0, 1, 2, 3])),
        "length": draw(st.sampled_from([1, 3, 7])),
        "d_in": draw(st.sampled_from([1, 5, 16, 19])),
        "d_out": draw(st.sampled_from([1, 7, 16])),
        "n_experts": n_experts,
        "k": draw(st.integers(1, n_experts)),
        "rank": draw(st.sampled_from([1, 3, 4])),
        "seed": draw(st.integers(0, 999)),
    }


def make_bank_case(name: str, variant: str, size: dict[str, int]) -> tuple[Any, Tensor]:
    torch.manual_seed(size["seed"])
    bank = laws.make_bank(name, variant, size["d_in"], size["d_out"], size["n_experts"], size["rank"])
    return bank, torch.randn(size["rows"], size["length"], size["d_in"], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------ banks


@banks
@few
@given(size=bank_sizes())
def test_bank(name: str, variant: str, size: dict[str, int]) -> None:
    bank, x = make_bank_case(name, variant, size)
    k = size["k"]
    laws.bank_selects(bank, x)
    laws.bank_is_linear(bank, x)
    laws.bank_broadcasts(bank, x, k)
    laws.bank_ignores_slot_order(bank, x, k)
    laws.bank_is_local(bank, x, k)
    laws.bank_delta_is_expert(bank, x)
    laws.bank_adds_no_constant(bank, x, k)
    laws.bank_relabels(bank, x, k)


@banks
@few
@given(size=bank_sizes(), dense=st.booleans())
def test_bank_fast_equals_generic_with_all_gradients(
    name: str, variant: str, size: dict[str, int], dense: bool
) -> None:
    bank, x = make_bank_case(name, variant, size)
    laws.bank_fast_is_generic(bank, x, size["k"], dense)


@banks
def test_bank_gated_is_its_parts(name: str, variant: str) -> None:
    bank = laws.make_bank(name, variant, 5, 7, 4, 3)
    for rows in ((2, 3), (1,), (70,)):
        laws.bank_gated_is_apart(bank, torch.randn(*rows, 5, dtype=torch.float64), 2)


@banks
@pytest.mark.parametrize("n_experts", [1, 4])
def test_bank_starts_as_declared(name: str, variant: str, n_experts: int) -> None:
    bank = laws.make_bank(name, variant, 5, 7, n_experts, 3)
    laws.bank_starts_as_declared(bank, torch.randn(2, 3, 5, dtype=torch.float64))


@banks
def test_bank_state_round_trip(name: str, variant: str) -> None:
    one, two = (laws.make_bank(name, variant, 5, 7, 4, 3) for _ in range(2))
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    routing = laws.random_routing((2, 3), 4, 2)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x, routing), one(x, routing))


# ------------------------------------------------------------------------------------------------ routers


@st.composite
def router_sizes(draw: Any) -> dict[str, int]:
    """Draw sizes: no rows, one expert, k = E."""
    n_experts = draw(st.integers(1, 6))
    return {
        "rows": draw(st.sampled_from([0, 1, 2, 3])),
        "length": draw(st.sampled_from([1, 2, 7])),
        "d_in": draw(st.sampled_from([1, 5, 19])),
        "n_experts": n_experts,
        "k": draw(st.integers(1, n_experts)),
        "seed": draw(st.integers(0, 999)),
    }


@routers
@few
@given(size=router_sizes(), training=st.booleans())
def test_routing_is_valid(name: str, variant: str, size: dict[str, int], training: bool) -> None:
    torch.manual_seed(size["seed"])
    router = laws.make_router(name, variant, size["d_in"], size["n_experts"], size["k"]).train(training)
    x = torch.randn(size["rows"], size["length"], size["d_in"], dtype=torch.float64)
    normalised = not {name, f"{name}-{variant}"} & laws.UNNORMALISED
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    laws.router_routing_is_valid(router, x, laws.make_context(x.shape[:-1], mask), normalised)


@routers
@few
@given(size=router_sizes())
def test_router_in_eval(name: str, variant: str, size: dict[str, int]) -> None:
    torch.manual_seed(size["seed"])
    router = laws.make_router(name, variant, size["d_in"], size["n_experts"], size["k"])
    x = torch.randn(size["rows"] + 1, size["length"], size["d_in"], dtype=torch.float64)
    mask = torch.rand(x.shape[:2]) < 0.7
    laws.router_is_deterministic_in_eval(router, x, laws.make_context(x.shape[:-1], mask))
    laws.router_is_batch_invariant(router, x, mask)
    laws.router_is_causal(router, x, prompt=(x.shape[1] + 1) // 2)


@routers
def test_router_parameters_are_reached(name: str, variant: str) -> None:
    router = laws.make_router(name, variant, 5, 6, 2)
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    laws.router_parameters_are_reached(router, x, laws.make_context((3, 7)))


@routers
def test_fresh_router_parameters_are_reached(name: str, variant: str) -> None:
    """What the router starts with must not be a dead point, e.g. zeros that give each other no gradient."""
    router = laws.make_router(name, variant, 5, 6, 2)
    if not hasattr(router, "reset_parameters"):
        assert not list(router.parameters())
        return
    router.reset_parameters()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    laws.router_parameters_are_reached(router, x, laws.make_context((3, 7)))


@routers
def test_router_state_round_trip(name: str, variant: str) -> None:
    one, two = (laws.make_router(name, variant, 5, 6, 2) for _ in range(2))
    laws.router_state_round_trip(one, two, torch.randn(3, 7, 5, dtype=torch.float64), laws.make_context((3, 7)))


# ------------------------------------------------------------------------------------------------ recipes


def build_llama(name: str, variant: str, **options: Any) -> Any:
    model = moa.build(models.llama(), laws.small_recipe(name, variant, **options))
    return models.randomise(model)


def batch_for(name: str) -> dict[str, Tensor]:
    batch = models.lm_batch()
    if laws.needs_tasks(name):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    return batch


def step_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }


def build_bert(name: str, variant: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a BERT with a recipe in its blocks, the head frozen so that the recipe alone can learn, and a batch."""
    recipe = laws.small_recipe(name, variant, targets=r".*encoder\.layer.*")
    batch = models.class_batch()
    if laws.needs_tasks(name):
        batch["task_ids"] = torch.arange(4) % laws.N_TASKS
    return moa.build(loud_bert(), recipe, modules_to_save=[]), batch


def loud_bert() -> Any:
    """Return a BERT whose head is drawn larger: as it is drawn, it hardly lets a gradient through."""
    base = models.bert()
    nn.init.normal_(base.classifier.weight, generator=torch.Generator().manual_seed(0))
    return base


def trained(name: str, variant: str, kind: str) -> tuple[Any, dict[str, Tensor], Any]:
    """Return a decoder or an encoder with random experts, a batch, and what makes its base anew."""
    if kind == "decoder":
        return build_llama(name, variant), batch_for(name), models.llama
    model, batch = build_bert(name, variant)
    return models.randomise(model), batch, loud_bert


both = pytest.mark.parametrize("kind", ["decoder", "encoder"])


@recipes
@both
def test_training_lowers_the_loss(name: str, variant: str, kind: str) -> None:
    if kind == "decoder":
        model, batch = moa.build(models.llama(), laws.small_recipe(name, variant)), batch_for(name)
    else:
        model, batch = build_bert(name, variant)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}

    def evaluate() -> float:
        model.eval()
        with torch.no_grad():
            return model(**batch).loss.item()

    before = evaluate()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)  # decay must not reach the base
    for _ in range(8):
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert evaluate() < before - 0.02
    for parameter_name, value in frozen.items():
        assert torch.equal(model.get_parameter(parameter_name), value), f"{parameter_name} is frozen and moved"


@recipes
@both
def test_every_routing_is_monitored(name: str, variant: str, kind: str) -> None:
    """Each decision of a training step is counted once, on real tokens alone, under the name of its layer."""
    model, batch, _ = trained(name, variant, kind)
    statistics = RoutingStatistics(laws.N_TASKS)
    model.observers.append(lambda traces: [statistics.add(trace, batch.get("task_ids")) for trace in traces])
    model.train()(**batch)
    layers = statistics.summary()
    decided = {layer for layer, branch in model.branches() if not isinstance(branch.router, FollowRouter)}
    assert {layer.split("#")[0] for layer in layers} == decided
    for layer, load in layers.items():
        assert_close(load.load.sum(), torch.ones_like(load.load.sum()), 1e-5, layer)
        assert load.rows > 0 and all(math.isfinite(value) for value in load.measures().values())


@recipes
@both
def test_every_trainable_parameter_gets_a_gradient(name: str, variant: str, kind: str) -> None:
    model, batch, _ = trained(name, variant, kind)
    for parameter_name, grad in step_gradients(model, batch).items():
        assert bool(grad.isfinite().all()) and bool(grad.any()), parameter_name


@recipes
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(name: str, variant: str, reentrant: bool) -> None:
    """In fp64: a reentrant checkpoint's first pass has no gradients, and its sums may run in another order."""
    model, batch = build_llama(name, variant).double(), batch_for(name)
    plain = step_gradients(model, batch)
    own_losses = any(b.router.stochastic or b.router.loss_weights for _, b in model.branches())
    if reentrant and own_losses:
        with pytest.raises(ConfigError, match="use_reentrant"):
            model.gradient_checkpointing_enable({"use_reentrant": True})
        return
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    model.base.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = step_gradients(model, batch)
    first_pass = model.preview is not None
    assert len(calls) == 2 * model.samples + first_pass, "nothing was recomputed"
    for parameter_name, grad in plain.items():
        assert_close(checkpointed[parameter_name], grad, 1e-9, parameter_name)


@recipes
def test_cached_generation_equals_the_full_forward(name: str, variant: str) -> None:
    model = build_llama(name, variant).eval()
    prompt = models.token_batch(rows=3, length=6)["input_ids"].clamp(min=2)
    extra = {"task_ids": torch.arange(3) % laws.N_TASKS} if laws.needs_tasks(name) else {}
    if not all(branch.router.causal for _, branch in model.branches()):
        with pytest.raises(ContextError, match="not causal"):
            model.generate(prompt, max_new_tokens=2, **extra)
        return
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **extra,
    )
    looked_at = torch.zeros_like(generated.sequences, dtype=torch.bool)
    looked_at[:, :6] = True
    with torch.no_grad():
        full = model(input_ids=generated.sequences, routing_mask=looked_at, **extra).logits
    assert_close(torch.stack(generated.logits, 1), full[:, 5:-1], 1e-5)


@recipes
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")  # dynamo does it
def test_compiled_mixture_is_the_same(name: str, variant: str) -> None:
    """One graph, without a break: the mixtures read and record through plain objects, no hooks, no host values."""
    torch._dynamo.reset()
    torch.manual_seed(3)
    base = nn.Linear(16, 24).requires_grad_(False)
    context = moa.Context(task_ids=torch.arange(2) % laws.N_TASKS, preview=torch.randn(2, 5, 16))
    recipe = laws.small_recipe(name, variant)
    mixture = models.randomise(Mixture(base, recipe.build(Site("up", base, 16, 24)), context, "up")).eval()
    compiled = torch.compile(mixture, fullgraph=True, backend="aot_eager")
    results = []
    for run in (mixture, compiled):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        mixture.zero_grad()
        y = run(x)
        y.square().sum().backward()
        results.append([y, x.grad, *laws.gradients(mixture)])
    for got, expected in zip(results[1], results[0], strict=True):
        assert_close(got, expected, 1e-5)


@recipes
@both
def test_save_and_load_bit_for_bit(name: str, variant: str, kind: str, tmp_path: Path) -> None:
    model, batch, base = trained(name, variant, kind)
    model.eval()
    for _, branch in model.branches():  # state that no gradient moves must come back too
        for buffer_name, buffer in branch.router.named_buffers():
            if buffer_name in branch.router.state_dict() and buffer.is_floating_point():
                buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=base())
    assert torch.equal(models.outputs_of(again, batch), models.outputs_of(model, batch))
    state = again.adapter_state_dict()
    assert state.keys() == model.adapter_state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.adapter_state_dict().items())
    assert [r for r, _ in again.recipes] == [r for r, _ in model.recipes]
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@recipes
@both
def test_fold_equals_unfolded_or_raises(name: str, variant: str, kind: str) -> None:
    model, batch, _ = trained(name, variant, kind)
    model.double().eval()
    before = models.outputs_of(model, batch)
    batch.pop("task_ids", None)
    inside = model.base
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    try:
        folded = model.merge_and_unload()
    except FoldError as error:
        assert ("model.layers.0" if kind == "decoder" else "encoder.layer.0") in str(error)
        assert all(torch.equal(model.get_parameter(n), p) for n, p in weights.items()), "half folded"
        return
    assert folded is inside and not any(isinstance(m, Mixture) for m in folded.modules())
    assert_close(models.outputs_of(folded, batch), before)


@recipes
def test_deep_copy_is_equal_and_independent(name: str, variant: str) -> None:
    model, batch = build_llama(name, variant).eval(), batch_for(name)
    before = models.outputs_of(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(models.outputs_of(twin, batch), before)
    assert all(m.context in (twin.context, twin.encoder_context) for m in twin.mixtures().values())
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    models.randomise(twin, seed=9)
    assert not torch.equal(models.outputs_of(twin, batch), before)
    assert torch.equal(models.outputs_of(model, batch), before)


@recipes
@pytest.mark.parametrize("kind", list(models.MODELS))
def test_fresh_model_equals_its_base(name: str, variant: str, kind: str) -> None:
    """Zero experts change nothing, in every kind of model; disabling and removing them restores the base exactly."""
    make, make_batch = models.MODELS[kind]
    batch = make_batch()
    base_logits = models.outputs_of(make(), batch)
    options = {} if RECIPES[name]().targets == "all-linear" else {"targets": "all-linear"}
    if (name, kind) in laws.REFUSED:
        with pytest.raises(ConfigError, match=laws.REFUSED[name, kind]):
            moa.build(make(), laws.small_recipe(name, variant, **options))
        return
    if variant == "sequence" and kind in ("plain", "bert"):  # rows without a sequence, as BERT's pooler has
        with pytest.raises(ShapeError, match="use granularity='token'"):
            models.outputs_of(moa.build(make(), laws.small_recipe(name, variant, **options)), batch)
        return
    model = moa.build(make(), laws.small_recipe(name, variant, **options))
    extra = {"task_ids": torch.arange(4) % laws.N_TASKS} if laws.needs_tasks(name) else {}
    if all(branch.bank.zero_at_init for _, branch in model.branches()):
        assert_close(models.outputs_of(model, {**batch, **extra}), base_logits, 1e-5)
    models.randomise(model)
    assert not torch.allclose(models.outputs_of(model, {**batch, **extra}), base_logits, atol=1e-3)
    with model.disable_adapter():
        heads_aside = not model.modules_to_save
        if heads_aside:
            assert torch.equal(models.outputs_of(model, {**batch, **extra}), base_logits)
    removed = model.unload()
    assert type(removed) is type(make())
    if heads_aside:
        assert torch.equal(models.outputs_of(removed, batch), base_logits)


# ------------------------------------------------------------------------------------------------ the laws themselves


def test_everything_registered_is_covered() -> None:
    assert {name for name, _ in laws.ROUTER_CASES} == set(ROUTERS)
    assert {name for name, _ in laws.BANK_CASES} == set(FAMILIES)
    assert {name for name, _ in laws.RECIPE_CASES} == set(RECIPES)


def test_the_comparison_fails_on_wrong_values() -> None:
    right = torch.randn(4, 3, dtype=torch.float64)
    assert_close(right, right)
    for wrong in (right * (1 + 1e-6), right + 1e-6, -right, right * float("nan"), right[:3], torch.zeros_like(right)):
        with pytest.raises(AssertionError):
            assert_close(wrong, right)


def fails(law: Any, *args: Any) -> None:
    with pytest.raises(AssertionError):
        law(*args)


def test_the_bank_laws_fail_on_wrong_banks() -> None:
    """Each law is broken on purpose once: a law that cannot fail proves nothing."""
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    make = functools.partial(laws.make_bank, "lora", "default", 5, 7, 4, 3)
    original = LoRABank.forward

    def broken(change: Any) -> Any:
        bank = make()
        bank.forward = lambda x, routing: change(bank, x, routing)
        return bank

    def weights(change: Any) -> Any:
        return broken(lambda bank, x, r: original(bank, x, moa.Routing(change(r.weights), r.indices, r.n_experts)))

    scaled = weights(lambda w: 1.001 * w)
    fails(laws.bank_selects, scaled, x)
    fails(laws.bank_fast_is_generic, scaled, x, 2, False)

    class OffGated(FusedFactors):
        def add_gated(self, *args: Any) -> Any:
            return [1.001 * super().add_gated(*args)[0]]

    def twin(**members: Any) -> Any:
        bank = make()
        bank.__class__ = type("Twin", (LoRABank,), members)
        return bank

    gated = twin(fused=property(OffGated))
    fails(laws.bank_gated_is_apart, gated, x, 2)
    fails(laws.bank_is_linear, weights(lambda w: w.abs()), x)
    slots = weights(lambda w: w * torch.arange(1, w.shape[-1] + 1))
    fails(laws.bank_ignores_slot_order, slots, x, 3)
    fails(laws.bank_is_local, broken(lambda bank, x, r: original(bank, x, r) + x.mean()), x, 2)
    numbered = broken(lambda bank, x, r: original(bank, x, r) + r.indices.square().sum(-1, keepdim=True))
    fails(laws.bank_relabels, numbered, x, 2)
    rows = broken(lambda bank, x, r: original(bank, x, r) * (1 + r.weights.ndim))
    fails(laws.bank_broadcasts, rows, x, 2)
    off = twin(delta=lambda self, e: LoRABank.delta(self, e).scaled(2.0))
    fails(laws.bank_delta_is_expert, off, x)

    def constant_twice(bank: Any, x: Tensor, routing: Any) -> Tensor:
        return LoRABank.forward(bank, x, routing) + routing.weights.sum(-1, keepdim=True)

    class OnlyUnderDropout(FusedFactors):
        def add_linear(self, x: Tensor, routing: Any, weight: Tensor, bias: Any) -> Tensor:
            y = super().add_linear(x, routing, weight, bias)
            return y + 1 if self.bank.training and self.bank.dropout else y

    fails(laws.bank_adds_no_constant, twin(forward=constant_twice), x, 2)
    fails(laws.bank_adds_no_constant, twin(fused=property(OnlyUnderDropout)), x, 2)
    equal = make()
    equal.reset_parameters = lambda: [p.data.zero_() for p in equal.parameters()]
    fails(laws.bank_starts_as_declared, equal, x)


def test_the_router_laws_fail_on_wrong_routers() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    context = laws.make_context((3, 7))
    make = functools.partial(laws.make_router, "linear", "softmax", 5, 6, 2)
    original = ROUTERS["linear"].forward

    def broken(change: Any) -> Any:
        router = make()
        router.forward = lambda x, context: change(router, x, context)
        return router

    def reweighted(change: Any) -> Any:
        def forward(router: Any, x: Tensor, context: Any) -> Any:
            r = original(router, x, context)
            return moa.Routing(change(r.weights), r.indices, r.n_experts, r.logits, r.scores)

        return broken(forward)

    fails(laws.router_routing_is_valid, reweighted(lambda w: w / w.sum()), x, context, True)  # over the whole batch
    twice = broken(lambda router, x, c: moa.Routing(x[..., :2], torch.zeros(3, 7, 2, dtype=torch.int64), 6))
    fails(laws.router_routing_is_valid, twice, x, context, False)
    noisy = broken(lambda router, x, c: original(router, x + torch.randn_like(x), c))
    fails(laws.router_is_deterministic_in_eval, noisy, x, context)
    pooled = broken(lambda router, x, c: original(router, x + x.mean(0, keepdim=True), c))
    fails(laws.router_is_batch_invariant, pooled, x, torch.ones(3, 7, dtype=torch.bool))
    future = broken(lambda router, x, c: original(router, x + x.mean(1, keepdim=True), c))
    fails(laws.router_is_causal, future, x, 3)
    deaf = broken(lambda router, x, c: original(router, x * 0, c))
    fails(laws.router_parameters_are_reached, deaf, x, context)
