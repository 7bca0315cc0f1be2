"""Finding layers and putting mixtures there. Run: pytest tests/mixture/test_sites.py"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError
from moa.layers import features
from moa.mixture.mixture import Mixture
from moa.mixture.sites import backbone_prefix, feed_forward_blocks, find_sites, linear_sites
from moa.mixture.sublayers import attention_sublayers
from tests import models


def endings(model: nn.Module, targets: str | tuple[str, ...]) -> set[str]:
    return {site.name.rsplit(".", 1)[-1] for site in find_sites(model, targets)}


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
FFN = {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ATTENTION | FFN),
        ("attention", ATTENTION),
        ("ffn", FFN),
        (("q_proj",), {"q_proj"}),
        (("self_attn.v_proj", "up_proj"), {"v_proj", "up_proj"}),
        (r".*\.0\..*_proj", ATTENTION | FFN),
    ],
)
def test_targets_of_a_decoder(targets, expected):
    model = models.llama()
    assert endings(model, targets) == expected
    assert not any("lm_head" in site.name for site in find_sites(model, "all-linear"))
    for site in find_sites(model, targets):
        assert site.module is model.get_submodule(site.name)
        assert (site.d_in, site.d_out) == (site.module.in_features, site.module.out_features)


def test_layers_of_one_index_by_regex():
    names = [site.name for site in find_sites(models.llama(), r"model\.layers\.1\.mlp\..*")]
    assert names == [f"model.layers.1.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("kind", "n_all", "n_attention", "n_ffn"),
    [("llama", 14, 8, 6), ("gpt2", 8, 4, 4), ("bert", 13, 8, 4), ("t5", 32, 24, 8), ("vit", 12, 8, 4)],
)
def test_groups_in_every_architecture(kind, n_all, n_attention, n_ffn):
    """Two blocks each; BERT's pooler is neither attention nor part of a pair."""
    model = models.MODELS[kind][0]()
    assert len(find_sites(model, "all-linear")) == n_all
    assert len(find_sites(model, "attention")) == n_attention
    assert len(find_sites(model, "ffn")) == n_ffn


def test_heads_are_left_out_but_can_be_named():
    model = models.bert()
    assert backbone_prefix(model) == "bert."
    assert "classifier" not in {site.name for site in find_sites(model, "all-linear")}
    assert [site.name for site in find_sites(model, ("classifier",))] == ["classifier"]


def test_sizes_of_conv1d_are_in_then_out():
    sites = {site.name: site for site in linear_sites(models.gpt2())}
    wide = sites["transformer.h.0.attn.c_attn"]
    assert (wide.d_in, wide.d_out) == (16, 48) and tuple(wide.module.weight.shape) == (16, 48)


def test_quantised_linears_say_their_sizes_without_being_linear():
    class Packed(nn.Module):
        def __init__(self, name_in: str, name_out: str) -> None:
            super().__init__()
            setattr(self, name_in, 8)
            setattr(self, name_out, 4)

    assert features(Packed("in_features", "out_features")) == (8, 4)
    assert features(Packed("infeatures", "outfeatures")) == (8, 4)
    assert features(nn.LayerNorm(4)) is None and features(nn.Embedding(3, 4)) is None


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_porj"], r"q_porj.*Near: q_proj.*Linear layers end in: down_proj"),
        ("q_proj", r"'q_proj' matches no linear layer of LlamaForCausalLM.*regex on the whole name"),
        ("ffnn", "matches no linear layer"),
        ("(", "not a regular expression"),
        ([], "matches no linear layer"),
    ],
)
def test_no_target_matched(targets, words):
    with pytest.raises(ConfigError, match=re.compile(words, re.DOTALL)):
        moa.build(models.llama(), "topk", targets=targets)


def test_a_model_of_convolutions_says_that_they_have_to_be_named():
    model = nn.Sequential(nn.ModuleDict({"conv": nn.Conv2d(3, 8, 1), "norm": nn.LayerNorm(4)}))
    with pytest.raises(ConfigError) as error:
        moa.build(model, "topk")
    assert "Convolutions, which have to be named, end in: conv." in str(error.value)
    assert "Linear layers end in" not in str(error.value) and "Near: all-linear" not in str(error.value)


def test_a_model_without_linear_layers():
    with pytest.raises(ConfigError, match="Sequential has no linear layer"):
        moa.build(nn.Sequential(nn.LayerNorm(4)), "topk")


def test_a_layer_that_carries_experts_is_not_found_again():
    model = moa.build(models.llama(), "topk", targets=["q_proj"])
    with pytest.raises(ConfigError, match="2 layers already carry experts"):
        moa.build(model, "topk", targets=["q_proj"])
    assert len(model.mixtures()) == 2


def test_multihead_attention_is_left_alone():
    """PyTorch's own attention reads its projection's weight and never calls it: experts there would do nothing."""
    model = models.transformer_encoder()
    names = [site.name for site in find_sites(model, "all-linear")]
    assert names == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    with pytest.raises(ConfigError):
        moa.build(model, "topk", targets=["out_proj"])


def test_the_fast_path_of_pytorchs_encoder_does_not_skip_experts():
    x = torch.randn(2, 5, models.WIDTH)
    model = models.randomise(moa.build(models.transformer_encoder(), "topk")).eval()
    with torch.no_grad():
        without_gradient = model(x)
    with model.disable_adapter(), torch.no_grad():
        base = model(x)
    with torch.enable_grad():
        assert torch.allclose(model(x), without_gradient, atol=1e-5)
    assert not torch.allclose(base, without_gradient, atol=1e-2)
    assert torch.allclose(base, models.transformer_encoder()(x), atol=1e-5)


class Shared(nn.Module):
    """One linear in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.two = self.one

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def test_a_shared_layer_gets_one_mixture(tmp_path):
    model = models.randomise(moa.build(Shared(), "topk", n_experts=3)).eval()
    assert isinstance(model.base.one, Mixture) and model.base.one is model.base.two
    assert len(model.mixtures()) == 1
    x = torch.randn(3, 4)
    expected = model(x)
    torch.manual_seed(0)
    base = Shared()
    base.load_state_dict(
        {f"{n}.{k}": model.base.one.base.state_dict()[k] for n in ("one", "two") for k in ("weight", "bias")}
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(moa.load(tmp_path, base=base)(x), expected)


def test_new_parameters_follow_the_layer():
    model = moa.build(models.llama().to(torch.bfloat16), "topk", targets=["q_proj"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}  # masters
    model = moa.build(models.llama().double(), "topk", targets=["q_proj"])
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float64}
    assert not any(m.training for m in model.mixtures().values())


class Steps(nn.Module):
    """A block as many write it: attention whose output is a Sequential, a feed-forward that is one."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"qkv": nn.Linear(d, 3 * d), "out": nn.Sequential(nn.Linear(d, d), nn.Dropout())}
        )
        self.ff = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        """Return (*, d)."""
        q, k, v = self.attention["qkv"](x).chunk(3, -1)
        x = x + self.attention["out"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.feed(x)

    def feed(self, x):
        """Return the feed-forward of x (*, d)."""
        return self.ff(x)


def test_the_steps_of_a_sequential_are_one_block():
    """Their own numbers do not part them; those of the blocks, in a list of lists too, do."""
    model = nn.Sequential(Steps(), Steps()).double().eval()
    assert [site.name for site in find_sites(model, "ffn")] == ["0.ff.1", "0.ff.3", "1.ff.1", "1.ff.3"]
    blocks = feed_forward_blocks(find_sites(model, "all-linear"))
    assert [[site.name for site in block] for block in blocks] == [["0.ff.1", "0.ff.3"], ["1.ff.1", "1.ff.3"]]
    pairs = attention_sublayers(find_sites(model, "all-linear"))
    assert [(a.name, b.name) for a, b in pairs] == [(f"{n}.attention.qkv", f"{n}.attention.out.0") for n in (0, 1)]


def test_layers_of_experts_in_lists_are_not_steps_of_one_block():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(3))
            self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(3))

    blocks = feed_forward_blocks(find_sites(nn.ModuleList([Experts(), Experts()]), "all-linear"))
    assert blocks == []


def test_experts_over_a_sequential_are_those_over_the_same_layers_by_name():
    """MixLoRA's whole blocks: the names of a block's layers say nothing of its values."""

    class Named(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.act, self.down = self.ff
            del self.ff

        def feed(self, x):
            return self.down(self.act(self.up(self.norm(x))))

    made = []
    for kind in (Steps, Named):
        torch.manual_seed(0)
        base = nn.ModuleList([kind()]).double().eval()
        model = models.randomise(moa.build(base, "mixlora", n_experts=3, k=2, targets="all-linear"))
        made.append(model.eval())
    sequential, named = made
    for one, other in zip(sequential.branches(), named.branches(), strict=True):
        other[1].load_state_dict(one[1].state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(sequential.base[0](x), named.base[0](x), rtol=1e-12, atol=1e-12)
    routed = [name for name, branch in sequential.branches() if list(branch.router.parameters())]
    assert routed == ["0.ff.1"], "one gate, on the block's first layer"
