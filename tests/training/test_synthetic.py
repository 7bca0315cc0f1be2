"""Prompts that a base writes, and the filter: what repeats, what is kept, two kinds of text that can be told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ConfigError
from moa.training.synthetic import Discriminator, synthetic_prompts
from tests import models
from tests.tiny_run import decoder_folder

SEEDS = ["red apple", "green pear", "blue plum", "ripe fig"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(decoder_folder(tmp_path_factory.mktemp("base")))


@pytest.fixture
def model(tokenizer: Any) -> moa.MoAModel:
    base = models.llama()
    base.resize_token_embeddings(len(tokenizer))
    return models.randomise(moa.build(base, "topk", n_experts=2, k=1, rank=2))


def test_prompts_differ_repeat_by_seed_and_leave_the_random_state(model: moa.MoAModel, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 3.0, "top_p": 1.0}
    state = torch.get_rng_state()
    found = synthetic_prompts(model.train(), tokenizer, SEEDS, 5, **options)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert len(set(found)) == 5 and not set(found) & set(SEEDS) and all(text.strip() for text in found)
    assert synthetic_prompts(model, tokenizer, SEEDS, 5, **options) == found
    assert synthetic_prompts(model, tokenizer, SEEDS, 5, seed=1, **options) != found
    with torch.no_grad():  # the base writes, not the experts
        for _, branch in model.branches():
            branch.bank.up[:] = torch.nan
    assert synthetic_prompts(model, tokenizer, SEEDS, 5, **options) == found


def test_a_filter_keeps_what_it_likes_and_too_little_is_said(model: moa.MoAModel, tokenizer: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "temperature": 3.0, "top_p": 1.0}

    def short(texts: list[str]) -> Tensor:
        return torch.tensor([float(len(text) < 25) for text in texts])

    assert all(len(text) < 25 for text in synthetic_prompts(model, tokenizer, SEEDS, 3, keep=short, **options))
    with pytest.raises(ConfigError, match=r"0 of 3 prompts differ .* and pass keep"):
        synthetic_prompts(model, tokenizer, SEEDS, 3, keep=lambda texts: torch.zeros(len(texts)), **options)


def test_a_discriminator_tells_two_kinds_apart(model: moa.MoAModel, tokenizer: Any) -> None:
    words = [token for token in tokenizer.get_vocab() if token.isalpha() and len(token) > 1]
    half = len(words) // 2
    rng = torch.Generator().manual_seed(0)

    def texts(pool: list[str], n: int) -> list[str]:
        return [" ".join(pool[i] for i in torch.randint(len(pool), (6,), generator=rng).tolist()) for _ in range(n)]

    judge = Discriminator(model, tokenizer, texts(words[:half], 30), texts(words[half:], 10))
    likely, unlikely = judge(texts(words[:half], 20)), judge(texts(words[half:], 20))
    assert (likely > 0.5).float().mean() >= 0.8 and (unlikely < 0.5).float().mean() >= 0.8


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shots": 5}, "shots=5 must be from 1 to the number of different seeds, 4"),
        ({"seeds": []}, "different seeds, 0"),
        ({"n": 0}, "n=0"),
        ({"temperature": 0.0}, "temperature=0.0 above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_numbers_out_of_range_are_named(
    model: moa.MoAModel, tokenizer: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        synthetic_prompts(model, tokenizer, **{"seeds": SEEDS, "n": 2, **options})


def test_bases_that_write_nothing_and_one_kind_of_text_are_refused(model: moa.MoAModel, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="does not generate"):
        synthetic_prompts(moa.build(models.bert(), "fixed", n_experts=1), tokenizer, SEEDS, 2)
    with pytest.raises(ConfigError, match="both kinds, got 4 real, 0 not"):
        Discriminator(model, tokenizer, SEEDS, [])


def test_seeds_empty_lines_and_repeats_are_left_out(
    model: moa.MoAModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ["red apple", "", "a quince", "a quince", "a date"]
    monkeypatch.setattr("moa.training.synthetic._lines", lambda *_: list(written))
    assert synthetic_prompts(model, tokenizer, SEEDS, 2) == ["a quince", "a date"]
    with pytest.raises(ConfigError, match="2 of 3 prompts differ"):
        synthetic_prompts(model, tokenizer, SEEDS, 3)
