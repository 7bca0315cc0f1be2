"""The laws over banks and routers; those over recipes are in tests/recipes. Run: pytest tests/test_laws.py"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moa
from moa.experts import FAMILIES, LoRABank
from moa.experts.factored import FusedFactors
from moa.recipes import RECIPES
from moa.routers import ROUTERS

from . import laws
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
