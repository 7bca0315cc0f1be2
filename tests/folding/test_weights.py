"""Folding a static mixture into its base weight. Run: pytest tests/folding/test_weights.py"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moa
from moa.errors import FoldError
from moa.mixture.mixture import Mixture
from tests import models
from tests.laws import assert_close


def build(kind: str, **options) -> moa.MoAModel:
    options = {"router": "fixed", "n_experts": 3, "rank": 2, **options}
    return models.randomise(moa.build(models.MODELS[kind][0](), modules_to_save=[], **options)).eval()


@pytest.mark.parametrize("kind", list(models.MODELS))
def test_a_folded_model_is_the_model(kind):
    """In fp64, for every kind of model, Conv1D included."""
    model, batch = build(kind).double(), models.MODELS[kind][1]()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    before = models.outputs_of(model, batch)
    folded = model.merge_and_unload()
    assert not any(isinstance(m, Mixture) for m in folded.modules())
    assert [n for n, _ in folded.named_parameters()] == [n for n, _ in models.MODELS[kind][0]().named_parameters()]
    assert_close(models.outputs_of(folded, batch), before)


def test_experts_have_the_weights_of_the_router():
    model = build("plain", targets=["up"]).double()
    (mixture,) = model.mixtures().values()
    mixture.branches[0].router.weights.copy_(torch.tensor([2.0, -1.0, 0.0]))
    x = torch.randn(5, models.WIDTH, dtype=torch.float64)
    expected = mixture(x)
    bank, start = mixture.branches[0].bank, mixture.base.weight.clone()
    layer = moa.fold(mixture)
    assert layer is mixture.base
    assert_close(layer(x), expected)
    assert_close(layer.weight - start, 2 * bank.delta(0).dense() - bank.delta(1).dense(), 1e-8)


def test_a_16_bit_base_is_rounded_once():
    model = moa.build(models.plain().to(torch.bfloat16), "fixed", n_experts=2, rank=2, modules_to_save=[])
    models.randomise(model)
    exact = {
        name: m.base.weight.double() + sum(m.branches[0].bank.delta(e).dense().double() for e in range(2)) / 2
        for name, m in model.mixtures().items()
    }
    folded = model.merge_and_unload()
    for name, weight in exact.items():
        got = folded.get_submodule(name).weight
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, weight.to(torch.float32).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["topk", "dense", "switch", "sigmoid", "noisy_topk", "remix"])
def test_a_routing_that_depends_on_the_input_is_refused_and_nothing_changes(name):
    model = models.randomise(moa.build(models.llama(), name, n_experts=4, rank=2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FoldError, match=r"model.layers.0.*depends on the input.*export_expert"):
        model.merge_and_unload()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_one_refusal_among_several_recipes_leaves_everything():
    model = models.randomise(moa.build(models.llama(), "fixed", n_experts=2, targets="attention"))
    moa.build(model, "topk", targets="ffn")
    weight = model.base.model.layers[0].self_attn.q_proj.base.weight.clone()
    with pytest.raises(FoldError, match="mlp"):
        model.merge_and_unload()
    assert torch.equal(model.base.model.layers[0].self_attn.q_proj.base.weight, weight)
    assert len(model.mixtures()) == 14


def test_a_base_without_a_dense_weight_is_refused():
    class Packed(nn.Module):
        """A quantised linear: it holds codes."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 4
            self.weight = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return x

    model = moa.build(nn.Sequential(Packed(), nn.Linear(4, 4)), "fixed")
    models.randomise(model)
    start = model.base[1].base.weight.clone()
    with pytest.raises(FoldError, match="0: a Packed holds no dense weight"):
        model.merge_and_unload()
    assert torch.equal(model.base[1].base.weight, start)


def test_the_old_parameters_are_left_to_whoever_shares_them():
    model = build("plain")
    shared = {name: (m.base.weight, m.base.weight.clone(), m.base.bias) for name, m in model.mixtures().items()}
    folded = model.merge_and_unload()
    for name, (weight, copy, _) in shared.items():
        assert torch.equal(weight, copy) and not torch.equal(folded.get_submodule(name).weight, copy)
        assert not folded.get_submodule(name).weight.requires_grad


def test_a_weight_tied_to_another_module_is_refused():
    model = moa.build(models.llama(tie_word_embeddings=True), "fixed", targets=["lm_head"])
    models.randomise(model)
    start = model.base.model.embed_tokens.weight.clone()
    with pytest.raises(FoldError, match=r"lm_head: its weight is also that of model.embed_tokens"):
        model.merge_and_unload()
    assert torch.equal(model.base.model.embed_tokens.weight, start)
