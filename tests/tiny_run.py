"""A tokenizer of twenty words, tiny bases in folders, task files and a configuration for runs of a second or two."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from moa.cli.main import main
from moa.runs.session import Run

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "the", "film", "was", "so", "very", "plot", "is", "it"]
VOCAB = ["[PAD]", "[UNK]", "[EOS]", *WORDS, "positive", "negative", "review", "label:"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=64
    )


def encoder_folder(folder: Path) -> Path:
    """Write a two-layer BERT and its tokenizer, and return the folder."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def decoder_folder(folder: Path) -> Path:
    """Write a two-layer Llama and its tokenizer, and return the folder."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.4,  # of the usual 0.02 the frozen output embeddings could not tell words apart
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Return n labelled sentences; the label is that of the only telling word."""
    draw = random.Random(seed)
    out = []
    for i in range(n):
        good = i % 2 == 0
        words = draw.choices(WORDS[6:], k=draw.randint(2, 6))
        words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS[:3] if good else WORDS[3:6]))
        out.append({"text": " ".join(words), "label": "positive" if good else "negative"})
    return out


def write_jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    """Write rows and return the path."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def config_values(folder: Path, base: Path, kind: str = "classification") -> dict[str, Any]:
    """Return the values of a configuration with two tasks, whose files are written into folder."""
    tasks: dict[str, Any] = {}
    for number, name in enumerate(("first", "second")):
        task = {
            "kind": kind,
            "train": str(write_jsonl(folder / f"{name}.train.jsonl", rows(32, number))),
            "eval": str(write_jsonl(folder / f"{name}.eval.jsonl", rows(12, 10 + number))),
        }
        if kind == "generation":
            task |= {"prompt": "text", "answer": "label", "template": "review {prompt} label:"}
        tasks[name] = task
    return {
        "base": str(base),
        "output": str(folder / "run"),
        "tasks": tasks,
        "max_length": 16,
        "recipe": {"router": "topk", "n_experts": 4, "k": 2, "rank": 2, "targets": "all-linear"},
        "training": {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 4,
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }


def train_with(monkeypatch: pytest.MonkeyPatch, callback: TrainerCallback) -> None:
    """Give the trainer of every run a callback more."""
    whole = Run.trainer

    def trainer(self: Run, *args: Any, **kwargs: Any) -> Any:
        made = whole(self, *args, **kwargs)
        made.add_callback(callback)
        return made

    monkeypatch.setattr(Run, "trainer", trainer)


def assert_refused(config: Path, message: str, capsys: pytest.CaptureFixture[str], *words: str) -> None:
    """Fail unless `moa train` ends with one line that holds a message, and nothing in the folder is new or gone."""
    before = sorted(config.parent.rglob("*"))
    capsys.readouterr()
    assert main(["train", str(config), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moa train: ") and message in error
    assert sorted(config.parent.rglob("*")) == before
