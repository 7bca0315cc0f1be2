"""The table of engines: one from outside the package, and what is refused by name.

Run: pytest tests/kernels/test_engine.py
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moa.errors import BackendError
from moa.experts import LoRABank
from moa.kernels import (
    Gate,
    dispatch,
    engine,
    engines,
    gated_linear,
    grouped_linear,
    has_slots,
    low_rank_mixture,
    mixture_linear,
    register_engine,
)
from moa.kernels.reference import low_rank_mixture_reference
from moa.types import Routing

from .compare import assert_same, make_case, results, truth

OUTSIDER = f"{__package__}.outsider"


@pytest.fixture
def table(monkeypatch) -> Iterator[None]:
    """Let a test register engines; the table is as before afterwards."""
    monkeypatch.setattr(engine, "_ROWS", dict(engine._ROWS))
    cached = engine.why_not, engine.abilities, engine._module, dispatch.choose
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def outsider(table):
    """The engine of another package, registered, and its module."""
    register_engine("outsider", OUTSIDER)
    module = importlib.import_module(OUTSIDER)
    module.calls.clear()
    return module


@pytest.mark.parametrize("k", [1, 2, None])
def test_an_engine_from_outside_is_used_by_name_in_value_and_every_gradient(outsider, k):
    case = make_case((9,), k=k)
    assert_same(results(partial(low_rank_mixture, engine="outsider"), case), truth(case))
    assert outsider.calls == ["forward", "backward"]
    results(low_rank_mixture, case)
    assert outsider.calls == ["forward", "backward"], "nobody else chooses it"


def test_the_comparison_fails_on_an_engine_that_is_wrong(outsider, monkeypatch):
    case = make_case((9,))
    monkeypatch.setattr(outsider, "scale", 1.001)
    with pytest.raises(AssertionError, match="y: relative error"):
        assert_same(results(partial(low_rank_mixture, engine="outsider"), case), truth(case))


def test_it_runs_on_top_of_a_base_with_a_gate_and_without_gradients(outsider):
    case = make_case((2, 4))
    weight, bias = torch.randn(7, 5).double(), torch.randn(7).double()

    def apart(x, *rest):
        return F.linear(x, weight, bias) + low_rank_mixture_reference(x, *rest)

    def fused(x, *rest):
        return mixture_linear(x, weight, bias, *rest, engine="outsider")

    expected = results(apart, case)
    assert_same(results(fused, case), expected)
    gate = torch.randn(4, 5).double()
    with torch.no_grad():
        torch.testing.assert_close(fused(case.x, case.a, case.b, case.weights, case.indices), expected[0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            operands = case.x, weight, bias, Gate(gate, 2), case.a, case.b
            found = [gated_linear(*operands, engine=e) for e in ("outsider", None)]
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("slots", [True, False])
def test_a_model_trains_with_it(outsider, slots):
    """Slots as well, which this engine has not: each is a mixture of one expert."""
    assert has_slots("outsider") is False and has_slots("sorted") is True
    torch.manual_seed(0)
    found = []
    for name in ("outsider", "concat"):
        torch.manual_seed(0)
        bank = LoRABank(6, 5, 4, rank=3, engine=name)
        nn.init.normal_(bank.up)
        x, indices = torch.randn(7, 6), torch.randint(0, 4, (7, 2))
        y = bank.fused.open_slots(x, indices, torch.zeros(7, 5)) if slots else bank(x, Routing(x[:, :2], indices, 4))
        y.square().sum().backward()
        found.append((y.detach(), bank.down.grad, bank.up.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)
    assert "backward" in outsider.calls


def test_its_module_is_imported_when_it_is_used():
    script = f"""
import sys
from moa.kernels import engines, register_engine
register_engine("outsider", {OUTSIDER!r})
assert {OUTSIDER!r} not in sys.modules
assert engines()["outsider"] is None
assert {OUTSIDER!r} in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(name: str):
    case = make_case()
    return low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices, engine=name)


def test_an_unknown_engine_lists_the_known_ones():
    with pytest.raises(BackendError, match=r"unknown engine 'consat'.*Did you mean 'concat'"):
        run("consat")


def test_what_is_missing_is_named(table):
    register_engine("packaged", OUTSIDER, package="flux_capacitor")
    register_engine("nowhere", "flux_capacitor.engine")
    register_engine("halved", "moa.kernels.bag")
    reasons = engines()
    assert reasons["packaged"] == (
        "it needs the package flux_capacitor, which is not installed: pip install flux_capacitor."
    )
    assert "No module named 'flux_capacitor'" in reasons["nowhere"]
    assert "has no forward and no backward and no why_not" in reasons["halved"]
    for name, words in {
        "packaged": "'packaged' cannot run here: it needs the package flux_capacitor",
        "nowhere": "'nowhere' cannot run here: its module flux_capacitor.engine cannot be imported",
        "halved": "'halved' cannot run here: its module moa.kernels.bag has no forward",
    }.items():
        with pytest.raises(BackendError, match=words):
            run(name)


def test_a_device_it_does_not_run_on_is_named(table):
    register_engine("gpu_only", OUTSIDER, devices=("cuda",))
    expected = r"runs on cuda, and .* on cpu" if torch.cuda.is_available() else "needs a CUDA device"
    with pytest.raises(BackendError, match=f"'gpu_only' .*{expected}"):
        run("gpu_only")
    register_engine("cpu_only", OUTSIDER, devices=("cpu",))
    with pytest.raises(BackendError, match=r"'cpu_only' runs on cpu, and the operands are on meta: move them"):
        engine.get_engine("cpu_only", "meta")
    with pytest.raises(BackendError, match=r"'cpu_only': there is no such device 'flux'"):
        register_engine("cpu_only", OUTSIDER, devices=("flux",))


def test_a_name_is_given_once(table):
    register_engine("mine", OUTSIDER)
    register_engine("mine", OUTSIDER)  # the same again, as a plug-in that is loaded twice does
    with pytest.raises(BackendError, match=rf"'mine' is {OUTSIDER} already"):
        register_engine("mine", "moa.kernels.concat")
    with pytest.raises(BackendError, match=r"'concat' is moa\.kernels\.concat already"):
        register_engine("concat", OUTSIDER)


def test_an_engine_without_slots_says_who_has_them(outsider):
    with pytest.raises(BackendError, match=r"'outsider' runs whole mixtures only.*'slots', as concat, sorted"):
        grouped_linear(torch.zeros(2, 5), torch.zeros(4, 6, 5), torch.zeros(2, 1, dtype=torch.int64), engine="outsider")
