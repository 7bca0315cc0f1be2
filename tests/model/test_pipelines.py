"""transformers goes by a model's class: pipelines, label smoothing. Run: pytest tests/model/test_pipelines.py"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moa
from tests import models
from tests.laws import assert_close

SMALL: dict[str, Any] = {
    "vocab_size": models.VOCAB,
    "hidden_size": models.WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TASKS = {
    "text-generation": (models.llama, {"max_new_tokens": 3, "do_sample": False}),
    "text-classification": (models.bert, {}),
    "feature-extraction": (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), {}),
    "fill-mask": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), {}),
    "token-classification": (lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SMALL)), {}),
    "zero-shot-classification": (models.bert, {"candidate_labels": ["w3", "w4"]}),
}


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = ["<pad>", "</s>", "<mask>", *(f"w{i}" for i in range(models.VOCAB - 3))]
    table = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=table, pad_token="<pad>", eos_token="</s>", mask_token="<mask>", unk_token="<pad>"
    )


def flat(answer: Any) -> list[Any]:
    """Return the values of an answer, nested as it is."""
    if isinstance(answer, dict):
        answer = list(answer.values())
    return [value for part in answer for value in flat(part)] if isinstance(answer, list) else [answer]


def with_fixed_weights(base: nn.Module) -> tuple[moa.MoAModel, nn.Module]:
    """Return a mixture, and the base into which a copy of it was folded."""
    model = moa.build(base, "fixed", n_experts=3, modules_to_save=())
    models.randomise(model, 0.1).eval()
    return model, copy.deepcopy(model).merge_and_unload()


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_answers_as_the_folded_base_and_complains_of_nothing(
    task: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = TASKS[task]
    torch.manual_seed(1)
    base = make()
    if task == "zero-shot-classification":
        base.config.label2id = {"contradiction": 0, "neutral": 1, "entailment": 2}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    answers = []
    for model in with_fixed_weights(base):
        pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer())
        answers.append(flat(pipe("w1 w2 <mask>" if task == "fill-mask" else "w1 w2 w3", **options)))
    assert "not supported" not in caplog.text
    for got, want in zip(*answers, strict=True):
        assert got == (pytest.approx(want, abs=1e-5) if isinstance(want, float) else want)


def test_label_smoothing_shifts_the_labels_of_a_decoder(tmp_path: Path) -> None:
    """Trainer looks the class's name up among the decoders."""
    model, folded = with_fixed_weights(models.llama())
    how = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    losses = [transformers.Trainer(m, how).compute_loss(m, models.lm_batch()) for m in (model, folded)]
    assert_close(*losses, 1e-5)
