"""Models of images and text generate with a mixture. Run: pytest tests/model/test_multimodal.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, ShapeError
from tests import models
from tests.model.test_bases import base
from tests.model.test_towers import SMALL, images, llava

IMAGE = 60  # the token in whose place a patch stands
TEXT = {
    **{"vocab_size": 64, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
    **SMALL,
}
PATCHES = {"image_size": 8, "patch_size": 2, "num_channels": 3, **SMALL}


def qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=58,
        vision_end_token_id=59,
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def idefics() -> nn.Module:
    vision = {"embed_dim": 16, "image_size": 8, "patch_size": 4, "intermediate_size": 24}
    config = transformers.IdeficsConfig(
        **{**TEXT, "num_key_value_heads": 2},
        additional_vocab_size=0,
        cross_layer_interval=1,
        use_resampler=False,
        vision_config={**vision, "num_attention_heads": 2, "num_hidden_layers": 2},
    )
    return transformers.IdeficsForVisionText2Text(config).eval()


def idefics2() -> nn.Module:
    heads = {"resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1}
    config = transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config=PATCHES,
        perceiver_config={"hidden_size": 16, "resampler_n_latents": 4, "resampler_depth": 1, **heads},
        image_token_id=IMAGE,
    )
    return transformers.Idefics2ForConditionalGeneration(config).eval()


def idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=PATCHES,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.Idefics3ForConditionalGeneration(config).eval()


def inputs(kind: str) -> dict[str, Any]:
    """Return two prompts of nine tokens, four of which stand for an image's patches; the second is padded."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 44, (2, 9), generator=rng)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    ids[1, 0] = 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    pixels = torch.randn(2, 1, 3, 8, 8, generator=rng)
    if kind == "idefics":  # the image is attended to, and stands in no token's place
        return {**batch, "pixel_values": pixels, "image_attention_mask": torch.ones(2, 9, 1, dtype=torch.long)}
    ids[:, 2:6] = 46 if kind == "llava" else IMAGE
    if kind == "llava":
        return {**batch, "pixel_values": images(2)}
    if kind != "qwen2-vl":
        return {**batch, "pixel_values": pixels}
    ids[:, 1], ids[:, 6] = 58, 59
    flat = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=rng)
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {**batch, "mm_token_type_ids": (ids == IMAGE).long(), "pixel_values": flat, "image_grid_thw": grid}


BASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llava": (llava, "vision_tower"),
    "qwen2-vl": (qwen2_vl, "visual"),
    "idefics": (idefics, "vision_model"),
    "idefics2": (idefics2, "vision_model"),
    "idefics3": (idefics3, "vision_model"),
}
RECIPES: dict[str, dict[str, Any]] = {"topk": {}, "remix": {"granularity": "sequence"}, "poly": {"n_tasks": 2}}


def written(model: Any, kind: str, **options: Any) -> Tensor:
    """Return the tokens that follow the prompts; those that stand for an image are none of them."""
    with torch.no_grad():
        out: Tensor = model.generate(
            **inputs(kind),
            max_new_tokens=5,
            do_sample=False,
            suppress_tokens=[46, IMAGE, 61, 58, 59],
            **options,
        )
    return out


def fresh(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[kind][0]()


@pytest.mark.parametrize("router", list(RECIPES))
@pytest.mark.parametrize("kind", list(BASES))
def test_tokens_with_a_cache_are_those_without(kind: str, router: str) -> None:
    tower = BASES[kind][1]
    model = models.randomise(moa.build(fresh(kind), router, n_experts=4, exclude=[tower], **RECIPES[router])).eval()
    assert model.mixtures() and not any(tower in name for name in model.mixtures())
    tasks = {"task_ids": torch.tensor([0, 1])} if router == "poly" else {}
    cached = written(model, kind, **tasks)
    assert torch.equal(cached, written(model, kind, use_cache=False, **tasks))
    if kind != "idefics":  # whose shut gates make texts of one token
        assert not torch.equal(cached, written(fresh(kind), kind))


@pytest.mark.parametrize("kind", list(BASES))
def test_a_folded_model_writes_the_same(kind: str) -> None:
    """The base with folded weights is the plain class of transformers: no mixture runs in it."""
    model = models.randomise(moa.build(fresh(kind), "fixed", n_experts=2)).eval()
    tokens = written(model, kind)
    with model.folded() as plain:
        assert torch.equal(written(plain, kind), tokens)


def test_a_resamplers_rows_are_its_latents_not_those_of_its_mask() -> None:
    model = moa.build(fresh("idefics2"), "topk", n_experts=4, k=2).eval()
    with torch.no_grad(), model.tracing() as trace:
        model(**inputs("idefics2"))
    for record in trace:
        inside = "text_model" in record.name
        assert (record.mask is not None) == inside, record.name


def test_rows_without_sequences_say_how_to_leave_their_tower_out() -> None:
    model = moa.build(fresh("qwen2-vl"), "remix", granularity="sequence", n_experts=4)
    with pytest.raises(ShapeError, match=r"leave this layer out with exclude="):
        written(model, "qwen2-vl")


def test_collapse_on_fused_experts_is_refused() -> None:
    model = moa.build(base("Mixtral"), "poly", n_tasks=2, n_experts=2, targets="moe-experts")
    before = [type(branch.bank) for _, branch in model.branches()]
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.experts carries them on fused experts"):
        model.adapt(mode="mu", collapse=True)
    assert [type(branch.bank) for _, branch in model.branches()] == before


def test_fused_experts_are_named_as_layers_are() -> None:
    named = moa.build(base("Mixtral"), "topk", targets=["mlp.experts"])
    assert list(named.mixtures()) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
