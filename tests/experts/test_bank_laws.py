"""The laws over every expert bank, and a broken bank for each. Run: pytest tests/experts/test_bank_laws.py"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import moa
from moa.experts import ExpertBank, LoRABank
from moa.experts.factored import FusedFactors
from moa.kernels import engines
from tests import laws

from . import bank_laws

few = settings(max_examples=12, deadline=None, derandomize=True)
banks = laws.parametrize(laws.BANK_CASES)


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
    return bank, torch.randn(size["rows"], size["length"], bank.d_in, dtype=torch.float64)


@banks
@few
@given(size=bank_sizes())
def test_bank(name: str, variant: str, size: dict[str, int]) -> None:
    bank, x = make_bank_case(name, variant, size)
    k = size["k"]
    bank_laws.bank_selects(bank, x)
    bank_laws.bank_is_linear(bank, x)
    bank_laws.bank_broadcasts(bank, x, k)
    bank_laws.bank_ignores_slot_order(bank, x, k)
    bank_laws.bank_is_local(bank, x, k)
    bank_laws.bank_delta_is_expert(bank, x)
    bank_laws.bank_adds_no_constant(bank, x, k)
    bank_laws.bank_relabels(bank, x, k)


@banks
@few
@given(size=bank_sizes(), dense=st.booleans())
def test_bank_fast_equals_generic_with_all_gradients(
    name: str, variant: str, size: dict[str, int], dense: bool
) -> None:
    bank, x = make_bank_case(name, variant, size)
    bank_laws.bank_fast_is_generic(bank, x, size["k"], dense)


@banks
def test_bank_gated_is_its_parts(name: str, variant: str) -> None:
    bank = laws.make_bank(name, variant, 5, 7, 4, 3)
    for rows in ((2, 3), (1,), (70,)) if bank.rowwise else ((2, 3), (1, 1), (1, 70)):
        bank_laws.bank_gated_is_apart(bank, torch.randn(*rows, bank.d_in, dtype=torch.float64), 2)


@banks
@pytest.mark.parametrize("n_experts", [1, 4])
def test_bank_starts_as_declared(name: str, variant: str, n_experts: int) -> None:
    bank = laws.make_bank(name, variant, 5, 7, n_experts, 3)
    bank_laws.bank_starts_as_declared(bank, torch.randn(2, 3, bank.d_in, dtype=torch.float64))


@banks
def test_bank_state_round_trip(name: str, variant: str) -> None:
    one, two = (laws.make_bank(name, variant, 5, 7, 4, 3) for _ in range(2))
    bank_laws.bank_state_round_trip(one, two, torch.randn(2, 3, one.d_in, dtype=torch.float64), 2)


@banks
@few
@given(size=bank_sizes())
def test_bank_drops_once(name: str, variant: str, size: dict[str, int]) -> None:
    torch.manual_seed(size["seed"])
    sizes = (size["d_in"], size["d_out"], size["n_experts"], size["rank"])
    bank = laws.make_bank(name, variant, *sizes, dropout=0.5)
    x = torch.randn(size["rows"], size["length"], bank.d_in, dtype=torch.float64)
    assert laws.uses(name, "dropout")
    bank_laws.bank_drops_once(bank, x, size["k"])


@banks
@pytest.mark.parametrize("engine", [name for name, why_not in engines().items() if why_not is None])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_bank_is_the_same_under_every_engine(name: str, variant: str, engine: str, dense: bool) -> None:
    """In fp64, or in fp32 under an engine that refuses fp64."""
    if not laws.uses(name, "engine"):
        return
    dtype, tolerance = (torch.float32, 1e-5) if engine == "grouped_mm" else (torch.float64, laws.TOLERANCE)
    bank = laws.make_bank(name, variant, 16, 24, 4, 8, engine=engine).to(dtype)
    x = torch.randn(2, 5, bank.d_in, dtype=dtype)
    bank_laws.bank_fast_is_generic(bank, x, 2, dense, tolerance)
    bank_laws.bank_gated_is_apart(bank, x, 2, tolerance)


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
    fails(bank_laws.bank_selects, scaled, x)
    fails(bank_laws.bank_fast_is_generic, scaled, x, 2, False)

    class OffGated(FusedFactors):
        def add_gated(self, *args: Any) -> Any:
            return [1.001 * super().add_gated(*args)[0]]

    def twin(**members: Any) -> Any:
        bank = make()
        bank.__class__ = type("Twin", (LoRABank,), members)
        return bank

    gated = twin(fused=property(OffGated))
    fails(bank_laws.bank_gated_is_apart, gated, x, 2)
    fails(bank_laws.bank_is_linear, weights(lambda w: w.abs()), x)
    slots = weights(lambda w: w * torch.arange(1, w.shape[-1] + 1))
    fails(bank_laws.bank_ignores_slot_order, slots, x, 3)
    fails(bank_laws.bank_is_local, broken(lambda bank, x, r: original(bank, x, r) + x.mean()), x, 2)
    numbered = broken(lambda bank, x, r: original(bank, x, r) + r.indices.square().sum(-1, keepdim=True))
    fails(bank_laws.bank_relabels, numbered, x, 2)
    rows = broken(lambda bank, x, r: original(bank, x, r) * (1 + r.weights.ndim))
    fails(bank_laws.bank_broadcasts, rows, x, 2)
    off = twin(delta=lambda self, e: LoRABank.delta(self, e).scaled(2.0))
    fails(bank_laws.bank_delta_is_expert, off, x)

    def constant_twice(bank: Any, x: Tensor, routing: Any) -> Tensor:
        return LoRABank.forward(bank, x, routing) + routing.weights.sum(-1, keepdim=True)

    class OnlyUnderDropout(FusedFactors):
        def add_linear(self, x: Tensor, routing: Any, weight: Tensor, bias: Any) -> Tensor:
            y = super().add_linear(x, routing, weight, bias)
            return y + 1 if self.bank.training and self.bank.dropout else y

    fails(bank_laws.bank_adds_no_constant, twin(forward=constant_twice), x, 2)
    fails(bank_laws.bank_adds_no_constant, twin(fused=property(OnlyUnderDropout)), x, 2)
    numbered = twin(per_expert=("down",))
    fails(bank_laws.bank_relabels, numbered, x, 2)
    equal = make()
    equal.reset_parameters = lambda: [p.data.zero_() for p in equal.parameters()]
    fails(bank_laws.bank_starts_as_declared, equal, x)
    loud = make()
    loud.reset_parameters = lambda: [p.data.normal_() for p in loud.parameters()]
    fails(bank_laws.bank_starts_as_declared, loud, x)
    dead = twin(equal_at_init=True, reset_parameters=lambda self: [p.data.zero_() for p in self.parameters()])
    fails(bank_laws.bank_starts_as_declared, dead, x)

    def forgetful() -> Any:
        bank = twin(forward=lambda self, x, r: original(self, x, r) + self.shift)
        bank.register_buffer("shift", torch.randn(7), persistent=False)
        return bank

    fails(bank_laws.bank_state_round_trip, forgetful(), forgetful(), x, 2)


def test_the_dropout_law_fails_on_wrong_banks() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)

    def law(**members: Any) -> None:
        bank = laws.make_bank("lora", "default", 5, 7, 4, 3, dropout=0.5)
        bank.__class__ = type("Twin", (LoRABank,), members)
        bank_laws.bank_drops_once(bank, x, 2)

    original = LoRABank.forward

    class DropsTheBase(FusedFactors):
        """Drops what the base sees, too."""

        def add_linear(self, x: Tensor, routing: Any, weight: Tensor, bias: Any) -> Tensor:
            return nn.functional.linear(x, weight * 0.5, bias) + self.bank(x, routing)

    class ForgetsDropout(FusedFactors):
        """Runs its kernel on x as it came."""

        def add_linear(self, x: Tensor, routing: Any, weight: Tensor, bias: Any) -> Tensor:
            self.bank.eval()
            y = super().add_linear(x, routing, weight, bias)
            self.bank.train()
            return y

        def add_gated(self, *args: Any) -> Any:
            self.bank.eval()
            found = super().add_gated(*args)
            self.bank.train()
            return found

    class GatesWithoutIt(ForgetsDropout):
        """Forgets it in one call with the gate."""

        add_linear = FusedFactors.add_linear

    def twice(bank: Any, x: Tensor, routing: Any) -> Tensor:
        return original(bank, nn.functional.dropout(x, 0.5, bank.training), routing)

    def never(bank: Any, x: Tensor, routing: Any) -> Tensor:
        return ExpertBank.forward(bank, x, routing)

    def always(bank: Any, x: Tensor, routing: Any) -> Tensor:
        return original(bank, x if bank.training else nn.functional.dropout(x, 0.5), routing)

    def on_the_output(bank: Any, x: Tensor, routing: Any) -> Tensor:
        return nn.functional.dropout(ExpertBank.forward(bank, x, routing), 0.5, bank.training)

    law()
    for forward in (twice, never, always, on_the_output):
        with pytest.raises(AssertionError):
            law(forward=forward)
    for fused in (DropsTheBase, ForgetsDropout, GatesWithoutIt):
        with pytest.raises(AssertionError):
            law(fused=property(fused))
