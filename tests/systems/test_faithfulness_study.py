"""The study of reasoning: questions whose answers follow, and the whole of it on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from experiments import faithfulness as study
from tests import models

TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def test_answers_follow_from_their_questions_and_none_is_learned_and_asked() -> None:
    learned, held = study.questions(60, 20, 0)
    assert len(learned) == 60 and all(len(own) == 20 for own in held.values())
    texts = [one.text for one in learned]
    assert len({*texts} | {one.text for own in held.values() for one in own}) == 100
    sums = [one for one in learned if "How many" in one.text]
    orders = [one for one in learned if "Who is" in one.text]
    assert len(sums) == len(orders) == 30 and texts[:30] != [one.text for one in sums]
    for one in sums:
        first, more, away = map(int, re.findall(r"\d+", one.text))
        assert one.answer == str(first + more - away) and one.reasoning.endswith(f" = {one.answer}.")
    for one in orders:
        older = dict(re.findall(r"(\w+) is older than (\w+)\.", one.text))
        last = "youngest" in one.text
        assert {one.answer} == ({*older.values()} - {*older} if last else {*older} - {*older.values()})
    assert all(one.answer in one.choices and len(set(one.choices)) == len(one.choices) for one in learned)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Return the folder of a tiny Llama that reads bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = Tokenizer(BPE({token: n for n, token in enumerate(["<pad>", "</s>", *letters])}, []))
    table.pre_tokenizer, table.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    base: Any = models.llama()
    base.resize_token_embeddings(len(tokenizer))
    base.config.max_position_embeddings = 512  # rotary: nothing is stored
    base.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_study_asks_before_and_after(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    probe = study.faithfulness

    def counted(model: Any, *rest: Any, **options: Any) -> Any:
        asked.append(any(branch.bank.up.any() for _, branch in model.branches()))
        return probe(model, *rest, **options)

    monkeypatch.setattr(study, "faithfulness", counted)
    found = study.study(folder, 16, 2)
    assert asked == [False] * 4 + [True] * 4
    for rows in (found["before"], found["after"]):
        for kind in study.KINDS:
            assert list(rows[kind]["own"]["early_end"]) == ["0.0", "0.25", "0.5", "0.75"]
            assert 0 <= rows[kind]["right"]["accuracy"] <= 1 and rows[kind]["right"]["reworded"] == 1
    assert found["before"] != found["after"]
