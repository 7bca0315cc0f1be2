"""Masks belong to the part of the model that the layer is in. Run: pytest tests/model/test_towers.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import moa
from moa.errors import ConfigError
from tests import models

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDE = 8  # of an image of 4 patches and a class token: 5 rows, as many as the texts have tokens


def ids_and_mask(pads: tuple[int, ...], length: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(2, 40, (len(pads), length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, length - pad - 1] = 47
        ids[row, length - pad :] = mask[row, length - pad :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(n: int = 3, channels: int = 1) -> Tensor:
    return torch.randn(n, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def clip() -> transformers.CLIPModel:
    torch.manual_seed(0)
    text = {"vocab_size": 48, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 47, "pad_token_id": 0}
    vision = {"image_size": SIDE, "patch_size": 4, "num_channels": 1}
    config = transformers.CLIPConfig(text_config={**text, **SMALL}, vision_config={**vision, **SMALL}, projection_dim=8)
    return transformers.CLIPModel(config).eval()


def llava() -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(image_size=SIDE, patch_size=4, num_channels=1, **SMALL)
    text = transformers.LlamaConfig(vocab_size=48, num_key_value_heads=1, pad_token_id=0, **SMALL)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=46,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def traced(model: moa.MoAModel, **inputs: Any) -> dict[str, Tensor | None]:
    """Return the mask under which each layer's routing was recorded."""
    with torch.no_grad(), model.tracing() as trace:
        model(**inputs)
    return {record.name: record.mask for record in trace}


def test_the_mask_of_a_text_is_the_text_towers_only() -> None:
    model = models.randomise(moa.build(clip(), "topk", n_experts=4, k=2)).eval()
    text = ids_and_mask((0, 2, 3))
    masks = traced(model, **text, pixel_values=images())
    of_text = {name for name in masks if name.startswith("text_model")}
    assert of_text and of_text < set(masks)
    for name, mask in masks.items():
        expected = text["attention_mask"].bool() if name in of_text else None
        assert (mask is None) == (expected is None), name
        assert mask is None or torch.equal(mask, expected), name


@pytest.mark.parametrize("recipe", [("topk", {"balance": 1.0}), ("remix", {"granularity": "sequence"})])
def test_images_do_not_depend_on_the_texts_beside_them(recipe: tuple[str, dict[str, Any]]) -> None:
    model = models.randomise(moa.build(clip(), recipe[0], n_experts=4, k=2, targets=r".*layers.*", **recipe[1])).eval()
    with torch.no_grad():
        outs = [model(**ids_and_mask(p, n), pixel_values=images()).image_embeds for p, n in _TEXTS]
        alone = model.get_image_features(pixel_values=images())
    alone = torch.nn.functional.normalize(getattr(alone, "pooler_output", alone), dim=-1)
    for out in (*outs, alone):
        assert torch.allclose(out, outs[0], atol=1e-6)


_TEXTS = [((0, 0, 0), 5), ((0, 2, 3), 5), ((1, 0, 2), 7)]


def test_the_text_of_an_image_model_keeps_its_mask() -> None:
    """LLaVA: the language model sees the text's mask, the vision tower and the projector between them none."""
    model = models.randomise(moa.build(llava(), "topk", n_experts=4, k=2)).eval()
    ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[:, 1:5] = 46  # four patches
    mask = torch.ones_like(ids)
    mask[1, :1] = 0
    masks = traced(model, input_ids=ids, attention_mask=mask, pixel_values=images(2))
    assert any("vision" in name for name in masks) and any("projector" in name for name in masks)
    for name, seen in masks.items():
        assert (seen is not None and torch.equal(seen, mask.bool())) == ("language_model" in name), name


def test_keys_and_values_of_cross_attention_have_the_encoders_mask() -> None:
    """Also where an answer is as long as its input, so that the sizes do not tell them apart."""
    model = models.randomise(moa.build(models.t5(), "topk", n_experts=4, k=2)).eval()
    batch = models.token_batch()
    labels = batch["input_ids"].clone()
    labels[:, -1] = -100
    masks = traced(model, **batch, labels=labels)
    encoder, decoder = batch["attention_mask"].bool(), labels != -100
    assert not torch.equal(encoder, decoder)
    for name, seen in masks.items():
        crossed = name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        expected = encoder if name.startswith("encoder") or crossed else decoder
        assert seen is not None and torch.equal(seen, expected), name


def test_unload_and_a_failed_build_leave_no_hook_behind() -> None:
    def hooks(model: torch.nn.Module) -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    base = clip()
    before = hooks(base)
    with pytest.raises(ConfigError):
        moa.build(base, [moa.make_recipe("topk"), moa.make_recipe("topk")])
    assert hooks(base) == before
    model = moa.build(base, "topk")
    assert hooks(base) > before
    assert hooks(model.unload()) == before
