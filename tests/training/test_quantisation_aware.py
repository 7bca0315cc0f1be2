"""Experts trained on the integers that they are deployed as. Run: pytest tests/training/test_quantisation_aware.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import moa
from moa.errors import CheckpointError, ConfigError, ContextError
from moa.layers import dequantised
from moa.training.integers import IntegerLinear, Rounded, row_scales
from moa.training.quantisation_aware import (
    deployed,
    learn_scales,
    quantisation_aware,
    read_scales,
    scaled_groups,
    settle_scales,
    write_scales,
)
from moa.training.quantisation_callback import QuantisationAwareCallback
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
        with model.tracing() as trace:
            model.eval()(**batch)
        assert {record.name for record in trace} == set(expected)
        with pytest.raises(ContextError, match="the same for all examples: leave out adapter_ids"):
            model(**batch, adapter_ids=[0, 1, 0, 1])
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


def test_learned_scales_have_the_gradient_of_their_formula() -> None:
    """Where it clips a numeric derivative is the oracle, elsewhere the paper's formula."""
    torch.manual_seed(0)
    weight, scale = torch.randn(5, 8, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64) * 0.1 + 0.1
    weight.requires_grad_(), scale.requires_grad_()
    grad = torch.randn(5, 8, dtype=torch.float64)
    (Rounded.apply(weight, scale, 7) * grad).sum().backward()
    inside = (weight / scale).abs() <= 7
    assert 5 < int((~inside).sum()) < 35
    per_entry = torch.where(inside, (weight / scale).round() - weight / scale, 7 * weight.sign())
    assert_close(scale.grad, (grad * per_entry).sum(1, keepdim=True).detach(), 1e-12)
    assert torch.equal(weight.grad, torch.where(inside, grad, 0))
    outside = torch.where(inside, 0, grad)  # no rounding there: a true derivative
    step = 1e-6
    change = [Rounded.apply(weight, scale + sign * step, 7) * outside for sign in (1, -1)]
    scale.grad = None
    (Rounded.apply(weight, scale, 7) * outside).sum().backward()
    assert_close(((change[0] - change[1]).sum(1, keepdim=True) / (2 * step)).detach(), scale.grad, 1e-6)


def test_learned_scales_train_at_their_own_rate_and_are_deployed_bit_for_bit(tmp_path: Path) -> None:
    """In float32: the outputs of the last training forward are those of the integers, here and after a reload."""
    model, batch = built(models.llama()).train(), models.lm_batch()
    learn_scales(model, 4)
    groups = scaled_groups(model, lr=1e-3, share=2.0, scale_lr=1e-4)
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert [names.pop(id(p)) for p in groups[-1]["params"]] and not names.keys() & {id(p) for p in groups[-1]["params"]}
    assert (groups[-1]["lr"], groups[-1]["weight_decay"]) == (1e-4, 0.0)
    assert {i for i in names} == {id(p) for g in groups[:-1] for p in g["params"]}
    optimizer = torch.optim.AdamW(groups, weight_decay=0.5)
    before = {n: b.grid.scale.detach().clone() for n, b in model.branches()}
    with quantisation_aware(model, 4):
        first = model(**batch).loss.item()
        for _ in range(5):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        inside = models.outputs_of(model, batch)
        assert model(**batch).loss.item() < first
    for name, branch in model.branches():  # Adam's steps are the rate's, without weight decay's
        assert 0 < (branch.grid.scale - before[name]).abs().max() <= 5.5e-4
    settle_scales(model)
    assert not any("grid" in name for name in model.adapter_state_dict())
    write_scales(model, tmp_path / "scales.safetensors")
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(models.outputs_of(deployed(model, 4), batch), inside)
    again = moa.load(tmp_path / "out", base=models.llama())
    assert not torch.equal(
        models.outputs_of(deployed(moa.load(tmp_path / "out", base=models.llama()), 4), batch), inside
    )
    assert read_scales(again, tmp_path / "scales.safetensors") == 4
    with pytest.raises(ConfigError, match="its scales were learned for bits=4, not 8"):
        deployed(again, 8)
    assert torch.equal(models.outputs_of(deployed(again, 4), batch), inside)
    with pytest.raises(CheckpointError, match=r"holds scales of .*not this model's layers"):
        read_scales(built(models.llama(), targets=["q_proj"]), tmp_path / "scales.safetensors")
    with pytest.raises(CheckpointError, match="holds no scales"):
        read_scales(built(models.llama()), tmp_path / "out" / "model.safetensors")
    with pytest.raises(ConfigError, match="has learned no scales"):
        write_scales(built(), tmp_path / "none")


def fitted(folder: Path, resume: str | None = None) -> Any:
    torch.manual_seed(0)
    model = built(models.bert(), targets=["query", "value"])
    args = TrainingArguments(
        str(folder), max_steps=4, report_to="none", use_cpu=True, disable_tqdm=True, save_steps=2,
        lr_scheduler_type="constant", per_device_train_batch_size=4, learning_rate=1e-3,
    )  # fmt: skip
    rows = [{"input_ids": torch.arange(2, 8) + n % 3, "labels": torch.tensor(n % 3)} for n in range(8)]
    Trainer(model, args, train_dataset=rows, callbacks=[QuantisationAwareCallback(bits=4)]).train(resume)
    return model


def test_with_trainer_a_run_goes_on_with_its_scales(tmp_path: Path) -> None:
    model, batch = fitted(tmp_path / "a"), models.class_batch()
    further = fitted(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2"))
    scales = {n: branch.grid.scale for n, branch in model.branches()}
    assert all(torch.equal(branch.grid.scale, scales[n]) for n, branch in further.branches())
    fresh = {n: row_scales(m.base.weight, 4) for n, m in model.mixtures().items()}
    assert not any(torch.equal(scale, fresh[n]) for n, scale in scales.items())
    outputs = models.outputs_of(model, batch)  # it stays on its integers
    assert torch.equal(models.outputs_of(deployed(further, 4), batch), outputs)
