"""The study of a pruned base, on a Llama of seven small blocks and tweets of twenty words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments import loram
from tests.tiny_run import VOCAB, tokenizer


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with a base, and tweets whose label is said by one word."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 7, "initializer_range": 0.4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(VOCAB), **sizes, **heads, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "vader").mkdir()
    words = {"positive": ("good", "fine", "great"), "negative": ("bad", "poor", "awful")}
    for part, n in (("train", 60), ("eval", 20)):
        rows = [
            {"text": f"the film was so {words[label][i % 3]}", "label": label}
            for i in range(n)
            for label in [("positive", "negative")[i // 3 % 2]]
        ]
        (tmp_path / "vader" / f"tweets.{part}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


def test_only_the_answer_has_a_label_and_a_long_tweet_loses_its_end() -> None:
    words = tokenizer()
    rows = [{"text": "good film", "label": "positive"}, {"text": "bad " * 99, "label": "negative"}]
    (batch,) = loram.batches(rows, words)
    assert batch["input_ids"].shape == (2, loram.TOKENS)
    ends = batch["attention_mask"].sum(1)
    for row, (end, label) in enumerate(zip(ends.tolist(), ("positive", "negative"), strict=True)):
        labels = batch["labels"][row]
        assert (labels != -100).nonzero().tolist() == [[end - 1]]
        assert labels[end - 1] == batch["input_ids"][row, end - 1] == words.encode(f" {label}")[0]
    prompt = words.encode("Tweet: good film\nPositive or negative:")
    assert batch["input_ids"][0, : ends[0] - 1].tolist() == prompt


def test_the_study_scores_every_arm_on_the_same_rows(home: Path) -> None:
    found = loram.study(home / "base", home, [0.5], trained=8, tested=8, seeds=1)
    lengths = {arm: len(runs) for arm, runs in found["arms"].items()}
    assert lengths == {
        "full, untrained": 1,
        "trained on the full one": 1,
        "pruned by 0.5, untrained": 1,
        "pruned by 0.5, trained, as it is": 1,
        "pruned by 0.5, trained, on the full one": 1,
    }
    assert found["parameters"]["pruned by 0.5"] < found["parameters"]["full"]
    assert found["majority"] == pytest.approx(5 / 8)
    base = LlamaForCausalLM.from_pretrained(home / "base")
    rows = loram.read(home / "vader" / "tweets.eval.jsonl", 8)
    assert loram.scored(base, rows, tokenizer()) == found["arms"]["full, untrained"][0]
    assert found["arms"]["trained on the full one"][0]["loss"] != found["arms"]["full, untrained"][0]["loss"]
