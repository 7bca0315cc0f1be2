"""Private training of cores: what is clipped, how much noise, what it spends. Run: pytest tests/federated"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

import moa
from moa.errors import BackendError, ConfigError
from moa.federated import train_privately
from tests import models

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="no opacus here"),
    # opacus's word on a noise so small, or so large, that its orders do not reach
    pytest.mark.filterwarnings("ignore:Optimal order is the"),
]
NUMBERS = {"steps": 1, "batch_size": 8, "noise_multiplier": 1e-10, "max_norm": 1e3, "seed": 0}


def private_model(router="fixed", **options):
    options = {"n_experts": 1, "expert": "core", "rank": 4, "modules_to_save": []} | options
    options = {name: value for name, value in options.items() if value is not None}
    return moa.build(models.bert(), router, **options)


def examples(count=8):
    batch = models.class_batch(rows=count)
    return [{name: tensor[n : n + 1] for name, tensor in batch.items()} for n in range(count)]


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def one_step(**numbers):
    """How far one step of plain SGD of rate 1 moves the cores, and the model."""
    model = private_model()
    before = [p.detach().clone() for p in trained(model)]
    spent = train_privately(model, examples(), torch.optim.SGD(trained(model), lr=1.0), **{**NUMBERS, **numbers})
    return torch.cat([(a - b.detach()).flatten() for a, b in zip(before, trained(model), strict=True)]), spent


def gradients():
    """Each example's gradient over all cores, one backward at a time."""
    model = private_model()
    rows = []
    for example in examples():
        model.zero_grad()
        model(**example).loss.backward()
        rows.append(torch.cat([p.grad.flatten() for p in trained(model)]))
    return torch.stack(rows)


def test_without_noise_and_clip_it_is_the_mean_gradient():
    moved, _ = one_step()  # every example is drawn: batch_size is N
    torch.testing.assert_close(moved, gradients().mean(0), rtol=1e-4, atol=1e-6)


def test_each_example_s_gradient_is_clipped_and_not_their_mean():
    norms = gradients().norm(dim=1)
    most = float(norms.median())
    moved, _ = one_step(max_norm=most)
    clipped = gradients() * (most / norms).clamp(max=1).unsqueeze(1)
    assert (norms > most).any() and not torch.allclose(moved, gradients().mean(0), rtol=1e-3)
    torch.testing.assert_close(moved, clipped.mean(0), rtol=1e-4, atol=1e-6)


def test_the_noise_is_as_large_as_it_says():
    moved, _ = one_step(max_norm=1e-6, noise_multiplier=1e6)  # deviation 1 on the sum, 1/8 on the mean
    assert moved.numel() > 100
    assert abs(float(moved.std()) * 8 - 1) < 5 / math.sqrt(2 * moved.numel())


def test_epsilon_is_the_gaussian_mechanism_s():
    """Without sampling, T steps of noise σ are a Gaussian mechanism: Rényi α T / (2 σ²), turned into ε at δ."""
    _, spent = one_step(steps=4, noise_multiplier=2.0, max_norm=1.0)
    assert spent.sample_rate == 1 and spent.steps == 4 and len(spent.losses) == 4
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    best = min(
        a * 4 / (2 * 2.0**2) + math.log1p(-1 / a) - math.log(1e-5 * a) / (a - 1) for a in orders
    )  # Canonne et al. 2020, arXiv 2004.00010, proposition 12
    assert spent.epsilon == pytest.approx(best, rel=1e-2)
    louder, longer = one_step(noise_multiplier=4.0, steps=4)[1], one_step(noise_multiplier=2.0, steps=9)[1]
    assert louder.epsilon < spent.epsilon < longer.epsilon


def test_sampling_spends_less_and_an_empty_step_is_noise():
    model = private_model()
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    numbers = {**NUMBERS, "steps": 12, "batch_size": 1, "noise_multiplier": 2.0, "max_norm": 1e-3}
    spent = train_privately(model, examples(), optimizer, **numbers)
    assert 0.0 in spent.losses  # nobody was drawn in some step
    assert spent.epsilon < one_step(steps=12, noise_multiplier=2.0, max_norm=1e-3)[1].epsilon
    assert all(not hasattr(p, "grad_sample") or p.grad_sample is None for p in model.parameters())
    assert model(**examples()[0]).loss.isfinite()


def test_a_router_s_statistics_tell_nothing():
    model = private_model("flylora", n_experts=8, rank=None, k=2, expert=None).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("selection_bias" in name for name in before)
    train_privately(model, examples(), torch.optim.SGD(trained(model), lr=1.0), **{**NUMBERS, "steps": 2})
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model(**examples()[0]).loss.backward()
    torch.optim.SGD(trained(model), lr=1.0).step()


def test_one_seed_is_one_run():
    assert torch.equal(one_step(noise_multiplier=1.0, max_norm=1.0)[0], one_step(noise_multiplier=1.0, max_norm=1.0)[0])


def test_what_is_not_private_is_refused(monkeypatch):
    model = private_model()
    optimizer = torch.optim.SGD(trained(model), lr=1.0)
    for change, message in (
        ({"steps": 0}, "steps must be a whole number from 1"),
        ({"batch_size": 9}, "batch_size must be a whole number from 1 to 8, got 9"),
        ({"noise_multiplier": 0.0}, "noise_multiplier must be above 0"),
        ({"max_norm": float("nan")}, "max_norm must be above 0"),
        ({"delta": 0.5}, "delta must be above 0 and below 0.125, got 0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_privately(model, examples(), optimizer, **{**NUMBERS, **change})
    with pytest.raises(ConfigError, match="there are no examples"):
        train_privately(model, [], optimizer, **NUMBERS)
    with pytest.raises(ConfigError, match=r"the optimizer must hold what trains, .*core is on only one side"):
        train_privately(model, examples(), torch.optim.SGD(trained(model)[1:], lr=1.0), **NUMBERS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"private training needs opacus, .* pip install opacus"):
        train_privately(model, examples(), optimizer, **NUMBERS)
