"""The card beside a checkpoint, read as the Hub reads it. Run: pytest tests/formats/test_card.py"""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import moa
from moa.errors import MoaWarning
from tests import models


def saved(folder: Path, router: str = "topk", **options: object) -> ModelCard:
    moa.build(models.llama(name_or_path="org/base"), router, targets=["q_proj"], **options).save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("name", ["topk", "remix", "poly"])
def test_the_hub_reads_base_library_and_tags(tmp_path: Path, name: str) -> None:
    card = saved(tmp_path, name)
    assert (card.data.library_name, card.data.base_model) == ("moa", "org/base")
    assert card.data.tags == ["moa", "mixture-of-adapters", name, "lora"]
    assert f"Recipe `{name}`" in card.text and "on 2 layers" in card.text


def test_a_card_is_filled_in_as_far_as_a_file_can(tmp_path: Path) -> None:
    """As PEFT's own tests want it: some text, and a place for what only its author knows."""
    model = moa.build(models.llama(name_or_path="org/base"), "topk", n_experts=2)
    model.save_pretrained(tmp_path / "mixture")
    moa.export_expert(model, 1, tmp_path / "lora")
    for folder, use in (
        ("mixture", 'moa.load("mixture")'),
        ("lora", 'AutoModelForCausalLM.from_pretrained("org/base")'),
    ):
        text = ModelCard.load(tmp_path / folder / "README.md").text
        assert len(text) > 1000 and use in text
        for title in ("Uses", "Training data", "Evaluation", "Bias, risks and limits", "License"):
            assert f"## {title}\n" in text


def test_a_base_made_in_memory_is_not_named(tmp_path: Path) -> None:
    moa.build(models.llama(), "topk", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and "base=model" in card.text and "`lm_head`" in card.text


def test_what_somebody_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\nMy words: 1 < 2\n")
    for _ in range(2):
        card = saved(tmp_path)
        assert card.data.license == "mit" and card.text == "My words: 1 < 2\n"
        assert card.data.tags == ["mine", "moa", "mixture-of-adapters", "topk", "lora"]


@pytest.mark.parametrize("text", ["---\nmeta: [hello\n---\ntext\n", "---\n- a\n---\ntext\n"])
def test_a_card_that_cannot_be_read_is_left_alone_and_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    with pytest.warns(MoaWarning, match=r"README\.md was left as it is"):
        moa.build(models.llama(), "topk").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
    assert moa.load(tmp_path, base=models.llama()).mixtures()


@pytest.mark.parametrize("there", [None, "Only words.\n", "---\ntags:\n- mine\n---\nWords.\n"])
def test_a_card_is_written_without_a_complaint(
    tmp_path: Path, there: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The Hub's reader would log that metadata are missing, which no user could do anything about."""
    if there is not None:
        (tmp_path / "README.md").write_text(there)
    moa.build(models.llama(), "topk", n_experts=2, k=1).save_pretrained(tmp_path)
    assert not [record.message for record in caplog.records if "etadata" in record.message]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "moa"
    assert there is None or there.splitlines()[-1] in card.text
