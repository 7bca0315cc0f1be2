"""Every base that transformers builds, mixtures of experts among them. Run: pytest tests/model/test_bases.py"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moa
from moa.errors import ConfigError, UnadaptedWarning
from moa.mixture import find_sites, fused_experts
from tests import models

SMALL = {
    "vocab_size": models.VOCAB,
    "hidden_size": models.WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SHARED = {**MANY, "shared_expert_intermediate_size": 12}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
ROUTED = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
DELTA = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"],
}
STATE = {
    **{"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    **{"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
}
# bases that are mixtures of fused experts: name of the model, name of the configuration, its options
FUSED: dict[str, dict[str, Any]] = {
    "Mixtral": LOCAL,
    "GraniteMoe": LOCAL,
    "Qwen2Moe": SHARED,
    "Qwen3Moe": MANY,
    "Qwen3Next": {**SHARED, **DELTA},
    "Olmoe": MANY,
    "DeepseekV3": {**LATENT, **ROUTED, "head_dim": 4},
    "GptOss": LOCAL,
    "Jamba": {"num_experts": 4, "num_experts_per_tok": 2, **STATE},
    "Glm4Moe": ROUTED,
    "Phimoe": LOCAL,
    "DeepseekV4": {
        **{"num_key_value_heads": 1, "q_lora_rank": 8, "o_lora_rank": 4, "o_groups": 2, "moe_intermediate_size": 12},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "hc_mult": 2, "sliding_window": 4, "index_topk": 2},
        **{
            "index_n_heads": 2,
            "index_head_dim": 8,
            "mlp_layer_types": ["hash_moe", "moe"],
            "partial_rotary_factor": 0.5,
        },
        **{"layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"]},
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
    },
    "Llama4": {"intermediate_size_mlp": 24, "num_local_experts": 4, "num_experts_per_tok": 1},
}
DENSE: dict[str, dict[str, Any]] = {
    "Phi3": {},
    "Glm": {},
    "Falcon": {},
    "Bloom": {},
    "Mamba": {"state_size": 4, "conv_kernel": 3, "time_step_rank": 4},
    "FalconMamba": {"state_size": 4, "conv_kernel": 3, "time_step_rank": 4},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 8},
    "ModernBertDecoder": {},
    "BigBird": {"attention_type": "original_full", "is_decoder": True, "max_position_embeddings": 64},
}


def base(kind: str) -> nn.Module:
    """Return a decoder of two layers with random weights."""
    torch.manual_seed(0)
    config = getattr(transformers, "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config")
    known = set(config().to_dict()) | set(FUSED.get(kind, {})) | set(DENSE.get(kind, {}))
    options = {name: value for name, value in SMALL.items() if name in known}
    model = getattr(transformers, f"{kind}ForCausalLM")
    return model(config(**{**options, **FUSED.get(kind, {}), **DENSE.get(kind, {})})).eval()


def built(kind: str, router: str = "topk", **options: Any) -> moa.MoAModel:
    """Return a model with experts, and see that fused experts, which get none, are named."""
    if kind not in FUSED:
        return moa.build(base(kind), router, **options)
    with pytest.warns(UnadaptedWarning, match="fused expert tensors of 3 axes"):
        return moa.build(base(kind), router, **options)


@pytest.mark.parametrize("kind", [*FUSED, *DENSE])
def test_a_base_builds_trains_saves_loads_and_generates(kind, tmp_path):
    batch = models.token_batch(2, 6)
    want = models.outputs_of(base(kind), batch)
    model = built(kind, n_experts=3, k=2)
    assert torch.allclose(models.outputs_of(model, batch), want, atol=1e-6)  # new experts add nothing
    models.randomise(model, 0.1)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not [name for name, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    assert not [name for name, p in model.named_parameters() if name not in trained and p.grad is not None]
    live = models.outputs_of(model, batch)
    assert not torch.allclose(live, want, atol=1e-5)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnadaptedWarning)
        again = moa.load(tmp_path, base=base(kind))
    assert torch.equal(models.outputs_of(again, batch), live)
    prompt = batch["input_ids"][:1]
    made = again.eval().generate(prompt, max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 9)
    whole = models.outputs_of(again, {"input_ids": made[:, :-1]})[:, -3:]
    assert torch.equal(whole.argmax(-1), made[:, -3:])  # the cache changes nothing


@pytest.mark.parametrize("kind", [*FUSED, *DENSE])
def test_folding_changes_no_output(kind):
    """Every layer that carries experts is used as its weight is: a fixed mixture and its fold are one model."""
    batch = models.token_batch(2, 6)
    model = models.randomise(built(kind, "fixed", n_experts=2), 0.2).eval()
    live = models.outputs_of(model, batch)
    folded = models.outputs_of(model.merge_and_unload(), batch)
    assert torch.allclose(folded, live, atol=1e-5 * float(live.abs().max().clamp(min=1)))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_the_bases_own_choice_of_kernels_stands(kind):
    """The wrapper answers with its base's class, and hands the choice on to it."""
    for implementation in ("eager", "grouped_mm"):
        model = base(kind)
        model.set_experts_implementation(implementation)
        with pytest.warns(UnadaptedWarning):
            built = moa.build(model, "topk")
        assert built.config._experts_implementation == implementation
        built.set_experts_implementation("eager")
        assert model.config._experts_implementation == "eager"
    assert type(built)._can_set_experts_implementation() and type(built)._supports_sdpa == type(model)._supports_sdpa
    built.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert moa.build(models.vit(), "topk").main_input_name == "pixel_values"


def test_the_summary_counts_layers_and_fused_experts():
    model = built("Mixtral")
    tensors = fused_experts(model.base)
    assert [name.rpartition(".")[2] for name, _ in tensors] == ["gate_up_proj", "down_proj"] * 2
    said = model.adapted_summary()
    assert said.startswith("experts on 8 Linear; 4 fused expert tensors of 3 axes (gate_up_proj, down_proj), ")
    share = sum(p.numel() for _, p in tensors) / sum(p.numel() for p in base("Mixtral").parameters())
    assert f"{share:.0%} of the base's weights" in said
    assert moa.build(models.llama(), "topk").adapted_summary() == "experts on 14 Linear."
    grouped, ranks = "self_attn.o_a_proj", "indexer.kv_proj, indexer.gate_proj, indexer.q_b_proj, scorer.weights_proj"
    left = {"BigBird": "1 linear layer (bert.pooler)", "DeepseekV4": f"6 linear layers ({grouped}, {ranks})"}
    for kind, names in left.items():
        assert names in built(kind).adapted_summary()


@pytest.mark.parametrize("kind", ["Phi3", "Glm"])
@pytest.mark.parametrize("router", ["topk", "mixlora"])
def test_a_fused_gate_up_is_a_feed_forward_block(kind, router):
    batch = models.token_batch(2, 6)
    want = models.outputs_of(base(kind), batch)
    model = moa.build(base(kind), router, n_experts=3, targets="ffn")
    assert list(model.mixtures()) == [
        f"model.layers.{n}.mlp.{m}" for n in (0, 1) for m in ("gate_up_proj", "down_proj")
    ]
    assert torch.allclose(models.outputs_of(model, batch), want, atol=1e-6)


def test_what_looks_like_a_block_by_its_sizes_is_none():
    found = [site.name for site in find_sites(base("OPT"), "ffn")]
    assert found == [f"model.decoder.layers.{n}.{m}" for n in (0, 1) for m in ("fc1", "fc2")]
    assert not [site.name for site in find_sites(base("Jamba"), "ffn") if "mamba" in site.name]


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "w_proj"], "'w_proj' matches no linear layer.*Near: v_proj, q_proj"),
        (
            ["q_proj", "embed_tokens"],
            "'embed_tokens' matches no .*model.embed_tokens is of class Embedding",
        ),
        (["q_proj", "gate_up_proj"], r"'gate_up_proj' matches no.*experts.gate_up_proj \(4, 48, 16\)"),
        ("ffn", r"Fused expert tensors of 3 axes.*experts.gate_up_proj \(4, 48, 16\)"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_though_another_matches(targets, words):
    with pytest.raises(ConfigError, match=words):
        moa.build(base("Mixtral"), "topk", targets=targets)


def test_targets_may_be_a_set():
    want = list(moa.build(models.llama(), "topk", targets=["q_proj", "v_proj"]).mixtures())
    assert list(moa.build(models.llama(), "topk", targets={"v_proj", "q_proj"}).mixtures()) == want
