"""Rows of images belong to the examples in whose texts they stand. Run: pytest tests/model/test_image_rows.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ContextError
from moa.model.elastic import at_rank
from moa.rows import ImageRows
from tests import models
from tests.model.test_multimodal import IMAGE, fresh, qwen2_vl
from tests.model.test_towers import images
from tests.systems import adapters

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
GRIDS = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 6]])  # 4, 4 and 6 places of 2 x 2 patches
OWNERS = {"qwen2-vl": [0, 0, 1], "llava": [0, 0], "idefics3": [0, 0, 1]}  # the example of each image


def whole_batch(kind: str) -> dict[str, Any]:
    """Return two texts of 18 tokens with images of different numbers, and sizes where the model takes any."""
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 44, (2, 18), generator=rng)
    token = 46 if kind == "llava" else IMAGE
    places = {"qwen2-vl": [(0, 2, 4), (0, 9, 4), (1, 3, 6)], "llava": [(0, 2, 4), (0, 9, 4)]}
    for row, start, n in places.get(kind, [(0, 2, 4), (0, 9, 4), (1, 3, 4)]):
        ids[row, start : start + n] = token
        if kind == "qwen2-vl":
            ids[row, start - 1], ids[row, start + n] = 58, 59
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if kind == "llava":
        return {**batch, "pixel_values": images(2).double()}
    if kind == "idefics3":  # as many to each example: one of zeros is none
        pixels = torch.randn(2, 2, 3, 8, 8, generator=rng, dtype=torch.double)
        pixels[1, 1] = 0
        return {**batch, "pixel_values": pixels}
    flat = torch.randn(int(GRIDS.prod(1).sum()), 3 * 2 * 4 * 4, generator=rng, dtype=torch.double)
    return {**batch, "mm_token_type_ids": (ids == IMAGE).long(), "pixel_values": flat, "image_grid_thw": GRIDS}


def one(kind: str, batch: dict[str, Any], example: int) -> dict[str, Any]:
    """Return an example by itself, with its own images."""
    own = [number for number, owner in enumerate(OWNERS[kind]) if owner == example]
    out = {name: value[example : example + 1] for name, value in batch.items() if len(value) == 2}
    if kind == "qwen2-vl":
        out["image_grid_thw"] = GRIDS[own]
        parts = batch["pixel_values"].split(GRIDS.prod(1).tolist())
        out["pixel_values"] = torch.cat([parts[number] for number in own])
    elif kind == "llava":
        out["pixel_values"] = batch["pixel_values"][own]
        if not own:
            del out["pixel_values"]
    return out


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**batch).logits
    return out


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "task_ids": ("poly", {"n_tasks": 2}),
    "adapter_ids": ("topk", {}),
    "ranks": ("topk", {"expert": "dylora", "rank": 4}),
}


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", list(OWNERS))
def test_an_example_alone_is_the_example_in_the_batch(kind: str, way: str) -> None:
    router, options = WAYS[way]
    model: Any = models.randomise(moa.build(fresh(kind), router, n_experts=3, **options)).double().eval()
    batch = whole_batch(kind)

    told = {"task_ids": torch.tensor([0, 1]), "adapter_ids": torch.tensor([2, -1]), "ranks": torch.tensor([1, 4])}[way]

    def run(inputs: dict[str, Any], values: Tensor) -> Tensor:
        if way == "ranks":
            with at_rank(model, values):
                return logits(model, inputs)
        return logits(model, {**inputs, way: values})

    together = run(batch, told)
    for example in (0, 1):
        real = batch["attention_mask"][example].bool()
        alone = run(one(kind, batch, example), told[example : example + 1])
        assert torch.allclose(alone[0][real], together[example][real], rtol=0, atol=1e-12)
    assert not torch.allclose(run(batch, told.flip(0)), together)


def test_patches_by_themselves_have_the_tasks_of_their_images() -> None:
    model: Any = models.randomise(moa.build(fresh("qwen2-vl"), "poly", n_tasks=3, n_experts=3)).double().eval()
    patches, tower = whole_batch("qwen2-vl")["pixel_values"], model.base.model.visual
    tasks = torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = tower(patches, grid_thw=GRIDS, task_ids=tasks).pooler_output
        parts = patches.split(GRIDS.prod(1).tolist())
        apart = [tower(p, grid_thw=GRIDS[n : n + 1], task_ids=tasks[n : n + 1]) for n, p in enumerate(parts)]
    assert torch.allclose(torch.cat([out.pooler_output for out in apart]), together, rtol=0, atol=1e-12)


def test_tokens_written_after_images_are_those_of_one_by_one() -> None:
    model: Any = models.randomise(moa.build(fresh("qwen2-vl"), "poly", n_tasks=2, n_experts=3)).double().eval()
    batch = whole_batch("qwen2-vl")
    batch["input_ids"][1, 0] = 0
    options = {"max_new_tokens": 4, "num_beams": 2, "suppress_tokens": [IMAGE, 61, 58, 59]}
    together = model.generate(**batch, task_ids=torch.tensor([0, 1]), **options)
    for example in (0, 1):
        alone = model.generate(**one("qwen2-vl", batch, example), task_ids=torch.tensor([example]), **options)
        assert torch.equal(alone[0], together[example])


def test_images_and_videos_together_are_refused_where_examples_differ() -> None:
    model: Any = moa.build(fresh("qwen2-vl"), "poly", n_tasks=2, n_experts=3).double().eval()
    batch = whole_batch("qwen2-vl")
    ids = batch["input_ids"]
    ids[1, 10:14] = 61
    batch["mm_token_type_ids"][1, 10:14] = 2
    batch |= {"pixel_values_videos": batch["pixel_values"][:16], "video_grid_thw": GRIDS[:1]}
    with pytest.raises(ContextError, match="give one example at a time"):
        logits(model, {**batch, "task_ids": torch.tensor([0, 1])})
    free = moa.build(fresh("qwen2-vl"), "poly", n_tasks=2, n_experts=3, exclude=["visual"]).double().eval()
    assert logits(free, {**batch, "task_ids": torch.tensor([0, 1])}).isfinite().all()


def test_rows_that_belong_to_nobody_are_refused() -> None:
    rows = ImageRows(torch.tensor([4, 2]))
    assert rows.spread(torch.tensor([7, 8]), (3, 5), "task_ids").tolist() == [[7], [7], [8]]
    assert rows.spread(torch.tensor([7, 8]), (1, 6), "task_ids").tolist() == [[7, 7, 7, 7, 8, 8]]
    assert rows.spread(torch.tensor([7, 8]), (12,), "task_ids").tolist() == [7] * 8 + [8] * 4
    for n_rows in (2, 4, 9):  # a row between two examples, places in parts, rows in parts
        with pytest.raises(ContextError, match=f"6 places for images and a layer sees {n_rows} rows"):
            rows.spread(torch.tensor([7, 8]), (n_rows, 5), "task_ids")


@pytest.mark.parametrize("n", [2, 3])
def test_streams_with_positions_of_three_axes_are_the_adapted_models(n: int, tmp_path: Path) -> None:
    """As many examples as axes, too: which axis is the batch's is not read off its size."""

    def make() -> Any:
        torch.manual_seed(0)
        return qwen2_vl()

    folders = adapters.write(tmp_path, make, n=2, targets=["q_proj", "up_proj"])
    model: Any = moa.build(make(), "xcross", experts=folders).eval()
    inputs = {"input_ids": torch.randint(2, 44, (n, 7), generator=torch.Generator().manual_seed(3))}
    axes = torch.stack([torch.arange(7) * step for step in (1, 2, 3)]).unsqueeze(1)
    inputs["position_ids"] = axes + torch.arange(n)[None, :, None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for number, folder in enumerate(folders):
        with torch.no_grad():
            model.streams.weights.copy_(torch.eye(2)[number])
        want = logits(peft.PeftModel.from_pretrained(make(), folder).eval(), inputs)
        assert torch.allclose(logits(model, inputs), want, atol=1e-5)
