"""Layers whose weight a model multiplies by itself. Run: pytest tests/mixture/test_uncalled.py"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import moa
from moa.errors import ConfigError
from moa.mixture import find_sites
from tests import models
from tests.model.test_bases import base

WAYS = {
    "linear": lambda x, w: F.linear(x, w),
    "matmul": lambda x, w: x @ w.T,
    "from the left": lambda x, w: (w @ x.mT).mT,
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "a part": lambda x, w: F.linear(x[:, :2], w[:, :2]),
    "a cast": lambda x, w: F.linear(x.double(), w.to(torch.float64)).float(),
    "masked": lambda x, w: F.linear(x, w * torch.ones_like(w).triu()),
    "moved": lambda x, w: F.linear(x, w + torch.ones(4, 4)),
    "by elements": lambda x, w: (x.unsqueeze(-2) * w).sum(-1),
    "detached": lambda x, w: torch.mm(x, w.detach().t().contiguous()),
}


class Reader(nn.Module):
    """Reads the weight of one layer in some way and calls another."""

    def __init__(self, way) -> None:
        super().__init__()
        self.read, self.called, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.way(x, self.read.weight))


@pytest.mark.parametrize("way", WAYS)
def test_a_product_with_a_mixtures_weight_is_an_error(way):
    model = moa.build(Reader(WAYS[way]), "topk", n_experts=2)
    for _ in range(2):  # at the first forward, and at any other
        with pytest.raises(ConfigError, match=r"^read: the model multiplies by this layer's weight"):
            model(torch.randn(3, 4))
    model = moa.build(Reader(WAYS[way]), "topk", n_experts=2, targets=["called"])
    assert model(torch.randn(3, 4)).shape == (3, 4)


class Careful(nn.Module):
    """Looks at weights in every way that uses no value of them with its input, and calls layers when it needs them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, rare: bool = False) -> Tensor:
        weight = self.rare.weight
        x = x.to(weight.dtype).to(weight).type_as(weight).to(weight.device)
        x = x + torch.zeros_like(weight)[0] + weight.new_zeros(weight.shape[1])
        assert weight.requires_grad is False and weight.ndim == 2 and len(weight) == weight.size(0)
        penalty = (weight @ weight.T - torch.eye(4)).norm() + weight.square().sum()
        assert float(penalty) > 0
        return self.rare(self.first(x)) if rare else self.first(x)


def test_a_look_at_a_weight_or_a_layer_not_needed_this_time_is_none():
    model, x = models.randomise(moa.build(Careful(), "topk", n_experts=2)), torch.randn(3, 4)
    few, all_of_it = model(x), model(x, rare=True)
    assert type(few) is Tensor and not torch.allclose(few, all_of_it)
    assert torch.equal(model(x), few)


def test_outside_of_a_forward_a_weight_is_the_frozen_parameter():
    model = moa.build(Careful(), "topk", n_experts=2)
    layer = model.base.first
    assert layer.weight is layer.base.weight and layer.bias is layer.base.bias
    assert (torch.ones(2, 4) @ layer.weight.T).shape == (2, 4)
    assert (layer.in_features, layer.out_features) == (4, 4)
    with pytest.raises(AttributeError, match="kernel_size"):
        layer.kernel_size  # noqa: B018
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(torch.ones(2, 4)), model(torch.ones(2, 4)))


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(4, 6), Conv1D(6, 4), nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, (1, 2), padding=1), nn.Conv3d(4, 6, 2)],
    ids=lambda layer: f"{type(layer).__module__.split('.')[0]} {type(layer).__name__}",
)
def test_every_layer_says_its_sizes_as_pefts_do(layer):
    ours = moa.build(nn.ModuleDict({"layer": copy.deepcopy(layer)}), "topk", targets=["layer"]).base["layer"]
    config = LoraConfig(target_modules=["layer"], fan_in_fan_out=isinstance(layer, Conv1D))
    theirs = get_peft_model(nn.ModuleDict({"layer": layer}), config).base_model.model
    for name in ("in_features", "out_features"):
        assert getattr(ours, name) == getattr(theirs["layer"], name)


@pytest.mark.parametrize("kind", ["Mamba", "FalconMamba", "Jamba"])
def test_a_known_layer_is_left_out_of_groups_and_named_when_asked_for(kind):
    assert not [site.name for site in find_sites(base(kind), "all-linear") if "dt_proj" in site.name]
    model = moa.build(base(kind), "topk", targets=["dt_proj"])
    with pytest.raises(ConfigError, match=r"layers\.0\.\w+\.dt_proj: the model multiplies by this layer's weight"):
        model(**models.token_batch(2, 6))
    with pytest.raises(ConfigError, match="dt_proj"):
        model.generate(models.token_batch(2, 6)["input_ids"], max_new_tokens=2)


def test_the_slow_path_of_bloom_is_named():
    config = transformers.BloomConfig(
        vocab_size=models.VOCAB, hidden_size=16, n_layer=2, n_head=2, pretraining_tp=2, slow_but_exact=True
    )
    model = moa.build(transformers.BloomForCausalLM(config), "topk")
    with pytest.raises(ConfigError, match=r"h\.0\.self_attention\.dense: the model multiplies"):
        model(**models.token_batch(2, 6))


def wavlm() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    conv = {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (4, 2), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    return transformers.WavLMForCTC(transformers.WavLMConfig(num_attention_heads=2, **sizes, **conv, **position)).eval()


def test_attention_that_reads_its_layers_is_left_out():
    model, sound = models.randomise(moa.build(wavlm(), "fixed", n_experts=2)).eval(), torch.randn(2, 800)
    names = {name.rpartition(".")[2] for name in model.mixtures()}
    assert names == {"projection", "intermediate_dense", "output_dense", "gru_rel_pos_linear"}
    with torch.no_grad():
        live = model(input_values=sound).logits
        assert torch.allclose(model.merge_and_unload()(input_values=sound).logits, live, atol=1e-5)
    model = moa.build(wavlm(), "fixed", targets=["v_proj"])
    with pytest.raises(ConfigError, match=r"attention\.v_proj: the model multiplies"):
        model(input_values=sound)


def test_routers_and_block_diagonal_layers_of_a_base_are_no_linear_layers_of_a_group():
    """They derive from `nn.Linear` and return something else, or want rows of another shape."""
    for kind, name in (("Llama4", "router"), ("Phimoe", "router")):
        assert not [site.name for site in find_sites(base(kind), "all-linear") if site.name.endswith(name)]
    falcon = {site.name.rpartition(".")[2] for site in find_sites(base("Falcon"), "all-linear")}
    assert falcon == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}  # a class with its own forward


def test_a_compiled_model_is_not_watched_and_does_not_fail():
    torch._dynamo.reset()
    model = models.randomise(moa.build(Careful(), "topk", n_experts=2)).eval()
    x = torch.randn(3, 4)
    with torch.no_grad():
        want = model(x)
        seen = []

        def backend(graph, inputs):
            seen.append(graph)
            return graph.forward

        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lin = model.base.first

            def forward(self, x: Tensor) -> Tensor:
                return F.linear(x.to(self.lin.weight.dtype), self.lin.weight)

        got = torch.compile(Plain(), backend=backend, fullgraph=True)(x)
    assert seen and torch.allclose(got, F.linear(x, model.base.first.base.weight)) and want.shape == got.shape


@pytest.mark.parametrize("kind", ["Bart", "MBart", "Pegasus", "Marian", "Blenderbot", "PLBart"])
def test_a_decoder_without_its_encoder_has_no_experts_on_the_attention_to_it(kind):
    """Every layer of "all-linear" gets a gradient; with the encoder, attention to it is among them."""
    parts = ("layers", "attention_heads", "ffn_dim")
    sizes = {
        f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in zip(parts, (1, 2, 24), strict=True)
    }
    config = getattr(transformers, f"{kind}Config")(vocab_size=48, d_model=16, max_position_embeddings=32, **sizes)
    config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, 1, 2
    whole = getattr(transformers, f"{kind}{'MTModel' if kind == 'Marian' else 'ForConditionalGeneration'}")
    with_encoder = {site.name for site in find_sites(whole(copy.deepcopy(config)), "all-linear")}
    assert any("encoder_attn" in name for name in with_encoder)
    model = models.randomise(moa.build(getattr(transformers, f"{kind}ForCausalLM")(config), "dense", n_experts=2))
    ids = torch.arange(3, 11)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    got = {name for name, layer in model.mixtures().items() if any(p.grad is not None for p in layer.parameters())}
    assert got == set(model.mixtures()) and len(got) == 6
