"""Every recipe's experts are PEFT adapters or say why not; peft is the oracle.

Run: pytest tests/formats/test_export_of_every_recipe.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

import moa
from moa.errors import FoldError
from tests import laws, models
from tests.laws import assert_close

REFUSED = {"hydra-biases": "add a constant"}  # why an expert is not a low-rank change


def check(model: moa.MoAModel, name: str, folder: Path) -> None:
    """Export the last expert and compare peft's logits with those of that expert pinned."""
    model.eval()
    expert = min(branch.bank.n_experts for _, branch in model.branches()) - 1
    batch = models.lm_batch()
    if laws.needs_tasks(name):
        batch["task_ids"] = torch.zeros(4, dtype=torch.long)
    with model.pin_expert(expert):
        expected = models.outputs_of(model, batch)
    moa.export_expert(model, expert, folder)
    batch.pop("task_ids", None)
    theirs = PeftModel.from_pretrained(models.llama(), folder).eval()
    plain = models.outputs_of(models.llama(), batch)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert_close(models.outputs_of(theirs, batch), expected, 1e-4)


@laws.parametrize(laws.RECIPE_CASES)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_exported_expert_is_the_pinned_expert(name: str, variant: str, tmp_path: Path) -> None:
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)))
    words = REFUSED.get(f"{name}-{variant}")
    if words is not None:
        with pytest.raises(FoldError, match=rf"model\.layers\.0.*{words}"):
            moa.export_expert(model, 0, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    check(model, name, tmp_path / "out")


@pytest.mark.parametrize("expert", ["lora", "shared", "headed"])
@pytest.mark.parametrize("place", ["input", "output"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_family_at_every_place(expert: str, place: str, tmp_path: Path) -> None:
    """On an output y0 = W x, B A y0 is the change B (A W), of the same rank."""
    model = models.randomise(moa.build(models.llama(), "topk", n_experts=3, rank=2, expert=expert, place=place))
    check(model, "topk", tmp_path / "out")
