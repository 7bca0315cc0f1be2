"""The laws over every router, and a broken router for each. Run: pytest tests/routers/test_router_laws.py"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moa
from moa.routers import LinearRouter
from tests import laws

from . import router_laws

few = settings(max_examples=12, deadline=None, derandomize=True)
routers = laws.parametrize(laws.ROUTER_CASES)


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


def rows_for(name: str, rows: int, length: int, d_in: int, n_experts: int) -> Tensor:
    """Return random x (rows, length, i), so many rows for each stream where the batch holds several."""
    return torch.randn(rows * (n_experts if name in laws.STREAMED else 1), length, d_in, dtype=torch.float64)


@routers
@few
@given(size=router_sizes(), training=st.booleans())
def test_routing_is_valid(name: str, variant: str, size: dict[str, int], training: bool) -> None:
    torch.manual_seed(size["seed"])
    router = laws.make_router(name, variant, size["d_in"], size["n_experts"], size["k"]).train(training)
    x = rows_for(name, size["rows"], size["length"], size["d_in"], size["n_experts"])
    normalised = not {name, f"{name}-{variant}"} & laws.UNNORMALISED
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    router_laws.router_routing_is_valid(router, x, laws.make_context(x.shape[:-1], mask, x), normalised)


@routers
@few
@given(size=router_sizes())
def test_router_in_eval(name: str, variant: str, size: dict[str, int]) -> None:
    torch.manual_seed(size["seed"])
    router = laws.make_router(name, variant, size["d_in"], size["n_experts"], size["k"])
    x = rows_for(name, size["rows"] + 1, size["length"], size["d_in"], size["n_experts"])
    mask = torch.rand(x.shape[:2]) < 0.7
    router_laws.router_is_deterministic_in_eval(router, x, laws.make_context(x.shape[:-1], mask, x))
    streams = size["n_experts"] if name in laws.STREAMED else 1
    router_laws.router_is_batch_invariant(router, x, mask, streams)
    router_laws.router_is_causal(router, x, prompt=(x.shape[1] + 1) // 2)


@routers
def test_router_parameters_are_reached(name: str, variant: str) -> None:
    router = laws.make_router(name, variant, 5, 6, 2)
    x = rows_for(name, 3, 7, 5, 6)
    router_laws.router_parameters_are_reached(router, x, laws.make_context(x.shape[:2], preview=x))


@routers
def test_fresh_router_parameters_are_reached(name: str, variant: str) -> None:
    """What the router starts with must not be a dead point, e.g. zeros that give each other no gradient."""
    router = laws.make_router(name, variant, 5, 6, 2)
    if not hasattr(router, "reset_parameters"):
        assert not list(router.parameters())
        return
    router.reset_parameters()
    x = rows_for(name, 3, 7, 5, 6)
    router_laws.router_parameters_are_reached(router, x, laws.make_context(x.shape[:2], preview=x))


@routers
def test_router_state_round_trip(name: str, variant: str) -> None:
    one, two = (laws.make_router(name, variant, 5, 6, 2) for _ in range(2))
    x = rows_for(name, 3, 7, 5, 6)
    router_laws.router_state_round_trip(one, two, x, laws.make_context(x.shape[:2], preview=x))


def fails(law: Any, *args: Any) -> None:
    with pytest.raises(AssertionError):
        law(*args)


def test_the_router_laws_fail_on_wrong_routers() -> None:
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    context = laws.make_context((3, 7))
    make = functools.partial(laws.make_router, "LinearRouter", "softmax", 5, 6, 2)
    original = LinearRouter.forward

    def broken(change: Any) -> Any:
        router = make()
        router.forward = lambda x, context: change(router, x, context)
        return router

    def reweighted(change: Any) -> Any:
        def forward(router: Any, x: Tensor, context: Any) -> Any:
            r = original(router, x, context)
            return moa.Routing(change(r.weights), r.indices, r.n_experts, r.logits, r.scores)

        return broken(forward)

    fails(
        router_laws.router_routing_is_valid, reweighted(lambda w: w / w.sum()), x, context, True
    )  # over the whole batch
    twice = broken(lambda router, x, c: moa.Routing(x[..., :2], torch.zeros(3, 7, 2, dtype=torch.int64), 6))
    fails(router_laws.router_routing_is_valid, twice, x, context, False)
    noisy = broken(lambda router, x, c: original(router, x + torch.randn_like(x), c))
    fails(router_laws.router_is_deterministic_in_eval, noisy, x, context)
    pooled = broken(lambda router, x, c: original(router, x + x.mean(0, keepdim=True), c))
    fails(router_laws.router_is_batch_invariant, pooled, x, torch.ones(3, 7, dtype=torch.bool))
    future = broken(lambda router, x, c: original(router, x + x.mean(1, keepdim=True), c))
    fails(router_laws.router_is_causal, future, x, 3)
    deaf = broken(lambda router, x, c: original(router, x * 0, c))
    fails(router_laws.router_parameters_are_reached, deaf, x, context)

    class Forgets(LinearRouter):
        """Routes by a buffer that its state does not hold."""

        def __init__(self) -> None:
            super().__init__(5, 6, 2)
            self.register_buffer("shift", torch.randn(6), persistent=False)

        def forward(self, x: Tensor, context: Any) -> Any:
            return super().forward(x + self.shift[:5], context)

    fails(router_laws.router_state_round_trip, Forgets().double(), Forgets().double(), x, context)

    class Counts(LinearRouter):
        """Moves its balance in evaluation, too."""

        def forward(self, x: Tensor, context: Any) -> Any:
            self.selection_bias += 1e-3
            return super().forward(x, context)

    fails(router_laws.router_is_deterministic_in_eval, Counts(5, 6, 2, bias_rate=0.1).double(), x, context)
