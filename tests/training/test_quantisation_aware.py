"""Experts trained on the integers that they are deployed as. Run: pytest tests/training/test_quantisation_aware.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError
from moa.layers import dequantised
from moa.training.quantisation_aware import IntegerLinear, deployed, quantisation_aware, row_scales, scaled_groups
from tests import models
from tests.laws import assert_close
from tests.systems import packed


def built(base: nn.Module | None = None, **options: Any) -> Any:
    made = models.llama().double() if base is None else base
    return moa.build(made, "fixed", **{"n_experts": 2, "rank": 2, **options})


def by_hand(weight: torch.Tensor, change: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the formula: one scale a row of W0, integers from -top to top."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1, keepdim=True) / top
    return torch.clamp(torch.round((weight + change) / scale), -top, top) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("expert", ["lora", "comp_lora", "dylora"])
def test_training_runs_on_what_is_deployed(expert: str, bits: int) -> None:
    model, batch = models.randomise(built(expert=expert), scale=0.3), models.lm_batch()
    expected = {}
    for name, mixture in model.mixtures().items():
        bank, weights = mixture.branches[0].bank, mixture.branches[0].router.constant().dense().reshape(-1)
        change = sum(w * bank.delta(e).dense() for e, w in enumerate(weights))
        expected[name] = by_hand(mixture.base.weight, change, bits)
    plain = models.outputs_of(model, batch)
    with quantisation_aware(model, bits):
        inside = models.outputs_of(model, batch)
        with model.disable_adapter():
            assert torch.equal(models.outputs_of(model, batch), models.outputs_of(models.llama().double(), batch))
    assert torch.equal(models.outputs_of(model, batch), plain) and not torch.allclose(inside, plain, atol=1e-6)
    base = deployed(model, bits)
    assert torch.equal(models.outputs_of(base, batch), inside)  # bit for bit
    for name, weight in expected.items():
        layer = base.get_submodule(name)
        assert isinstance(layer, IntegerLinear) and layer.codes.dtype == torch.int8
        assert_close(dequantised(layer), weight, 1e-10)


@pytest.mark.parametrize("kind", ["quanto-int8", "bnb-8bit", "torchao-int8"])
def test_without_a_change_it_is_the_quantised_base(kind: str) -> None:
    """The rows' own integers are found again, whatever the largest of them is."""
    base = packed.quantised(kind)
    layers = {name: dequantised(m).float() for name, m in base.model.named_modules() if hasattr(m, "in_features")}
    out = deployed(built(base), 8)
    for name, weight in layers.items():
        assert_close(out.model.get_submodule(name).dequantize(), weight, 1e-6)


def test_scales_of_integers_are_found_and_others_are_the_largest_value() -> None:
    codes = torch.randint(-50, 51, (6, 40), dtype=torch.float64)
    codes[:, 0], codes[:, 1] = torch.tensor([50, 49, 37, -50, 41, 2]), 1
    scale = torch.rand(6, 1, dtype=torch.float64) + 0.1
    found = (codes * scale) / row_scales(codes * scale, 8)
    assert_close(found, found.round(), 1e-10)
    dense = torch.randn(5, 40, dtype=torch.float64)
    dense[2] = 0
    expected = torch.where(dense.abs().amax(1, keepdim=True) > 0, dense.abs().amax(1, keepdim=True) / 7, 1)
    assert_close(row_scales(dense, 4), expected, 1e-12)


def test_gradients_stop_where_it_clips() -> None:
    """A numeric derivative of the loss by the rounded weight, carried to the factors by hand, is the oracle."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    model = models.randomise(built(nn.Sequential(layer), n_experts=1, alpha=2.0, targets=["0"]), scale=0.4)
    x, target = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    bank = model.mixtures()["0"].branches[0].bank
    change = bank.delta(0).dense()
    top, scale = 7, layer.weight.abs().amax(1, keepdim=True) / 7
    rounded = by_hand(layer.weight, change, 4).requires_grad_()
    ((x @ rounded.T - target) ** 2).sum().backward()
    inside = ((layer.weight + change) / scale).abs() <= top
    assert 0 < int((~inside).sum()) < inside.numel()
    grad = torch.where(inside, rounded.grad, 0)
    with quantisation_aware(model.train(), 4):
        ((model(x) - target) ** 2).sum().backward()
    assert_close(bank.up.grad[0], bank.scaling * bank.down[0] @ grad.T, 1e-10)
    assert_close(bank.down.grad[0], bank.scaling * bank.up[0] @ grad, 1e-10)


def test_training_lowers_the_loss_of_the_integers() -> None:
    model, batch = built(models.llama()).train(), models.lm_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    with quantisation_aware(model, 4):
        before = model(**batch).loss.item()
        for _ in range(12):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = model(**batch).loss.item()
    assert after < before - 0.1
    assert deployed(model, 4).eval()(**batch).loss.item() == pytest.approx(after, abs=1e-6)


def test_experts_step_by_their_layers_scale() -> None:
    model = built()
    groups = scaled_groups(model, lr=1e-3, bits=4)
    for group, mixture in zip(groups, model.mixtures().values(), strict=True):
        scale = mixture.base.weight.abs().amax(1) / 7
        assert group["lr"] == pytest.approx(float(scale.mean()) / 2500)
        assert {id(p) for p in group["params"]} == {id(p) for p in mixture.branches[0].bank.parameters()}


@pytest.mark.parametrize(
    ("options", "bits", "words"),
    [
        ({}, 9, "bits must be a whole number from 2 to 8, got 9"),
        ({}, True, "bits must be a whole number"),
        ({"router": "topk"}, 4, r"layers\.0\.self_attn\.q_proj: only experts with factors .* under a constant routing"),
        ({"expert": "dora"}, 4, "only experts with factors"),
        ({"dropout": 0.1}, 4, "without dropout"),
    ],
)
def test_what_cannot_be_rounded_is_refused(options: dict[str, Any], bits: Any, words: str) -> None:
    options = {"router": "fixed", "n_experts": 2, "rank": 2, **options}
    model = moa.build(models.llama(), **options)
    with pytest.raises(ConfigError, match=words), quantisation_aware(model, bits):
        pass
    with pytest.raises(ConfigError, match=words):
        deployed(model, bits)
    assert model.mixtures()
