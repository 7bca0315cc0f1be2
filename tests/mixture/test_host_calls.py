"""Calls of the package in one forward through one layer: counted, not timed, so that they cannot creep back.

Run: pytest tests/mixture/test_host_calls.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import moa
from experiments.bench.host import OneLinear, calls_of, count
from moa.experts.factored import FusedFactors
from moa.objective import Trace

PACKAGE = Path(moa.__file__).parent
X = torch.ones(2, 4, 8)
# Training or not -> of one layer, and of a whole model with this one layer: most calls, files, changes of file.
LAYER = {True: (33, 16, 27), False: (28, 15, 24)}
MODEL = {True: (172, 35, 122), False: (81, 27, 62)}


def layer(training: bool, router: str = "topk") -> dict[str, int]:
    """Return the counts of one forward through the layer, with a trace where the model would open one."""
    model = moa.build(OneLinear(), router=router, targets=["layer"]).train(training)
    mixture, context = model.mixtures()["layer"], model.context
    context.trace = Trace() if training else None
    with torch.set_grad_enabled(training):
        return count(calls_of(lambda: mixture(X), PACKAGE))


def whole(training: bool) -> dict[str, int]:
    """Return the counts of one forward of the model, its entry, its losses and what its routers count included."""
    model = moa.build(OneLinear(), router="topk", targets=["layer"]).train(training)
    with torch.set_grad_enabled(training):
        return count(calls_of(lambda: model(X), PACKAGE))


def within(counts: dict[str, int], most: tuple[int, int, int]) -> bool:
    return all(counts[kind] <= limit for kind, limit in zip(("calls", "files", "changes"), most, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_takes_few_calls(training):
    counts = layer(training)
    assert within(counts, LAYER[training]), counts


@pytest.mark.parametrize("training", [True, False])
def test_a_model_takes_few_calls(training):
    counts = whole(training)
    assert within(counts, MODEL[training]), counts


@pytest.mark.parametrize("training", [True, False])
def test_a_longer_way_is_seen(training, monkeypatch):
    monkeypatch.setattr(FusedFactors, "add_gated", lambda *args: None)  # gate and experts one after the other
    assert not within(layer(training), LAYER[training])


@pytest.mark.parametrize("router", ["switch", "sigmoid", "dense"])
@pytest.mark.parametrize("training", [True, False])
def test_every_linear_gate_goes_the_short_way(router, training):
    calls, files, changes = LAYER[training]
    counts = layer(training, router)
    assert within(counts, (calls + 4, files, changes)), counts  # jitter, sums of scores
