"""A cache that a first pass or streams follow. Run: pytest tests/mixture/test_caches.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import moa
from moa.errors import ContextError
from moa.mixture.caches import JointCache, cache_in_streams, with_follower
from tests import models

PROMPT = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])


def build(name: str) -> Any:
    model = models.randomise(moa.build(models.llama(), moa.make_recipe(name, n_experts=3, rank=2)), scale=0.2)
    return model.eval()


def filled(rows: int, start: int = 0) -> DynamicCache:
    """Return a cache of one layer whose row r holds r + start everywhere, two positions long."""
    cache = DynamicCache()
    values = (torch.arange(rows) + start)[:, None, None, None].float().expand(rows, 1, 2, 3)
    cache.update(values.clone(), values.clone(), 0)
    return cache


def rows_of(cache: Any) -> list[int]:
    return [int(row) for row in cache.layers[0].keys[:, 0, 0, 0]]


def test_rows_move_in_every_stream() -> None:
    cache = cache_in_streams(filled(6), 2, 3)  # rows 0, 1, 2 of stream 0, then 3, 4, 5 of stream 1
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert rows_of(cache) == [2, 2, 0, 5, 5, 3]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert rows_of(cache) == [2, 0, 5, 3]
    cache.batch_repeat_interleave(2)
    assert rows_of(cache) == [2, 2, 0, 0, 5, 5, 3, 3]
    cache.batch_select_indices(torch.tensor([3]))
    assert rows_of(cache) == [0, 3]


def test_a_follower_does_what_the_caller_does() -> None:
    given = DynamicCache()
    cache = with_follower(given)
    for one in (cache, cache.follower):
        one.update(*[filled(3).layers[0].keys] * 2, 0)
    both = cache_in_streams(cache, 1, 3)
    both.reorder_cache(torch.tensor([2, 0, 1]))
    both.crop(-1)
    assert rows_of(both) == rows_of(both.follower) == [2, 0, 1]
    assert both.get_seq_length() == both.follower.get_seq_length() == 1
    both.batch_select_indices(torch.tensor([1]))
    both.batch_repeat_interleave(2)
    assert rows_of(both) == rows_of(both.follower) == [0, 0]
    assert type(given) is DynamicCache and set(vars(given)) == set(vars(DynamicCache())), "the user's is as it came"
    assert isinstance(cache, DynamicCache)


@pytest.mark.parametrize("name", ["xlora", "xcross"])
def test_decoding_step_by_step_with_a_cache_of_ones_own(name: str) -> None:
    model, cache = build(name), DynamicCache()
    with torch.no_grad():
        full = model(input_ids=PROMPT).logits
        out = model(input_ids=PROMPT[:, :6], past_key_values=cache)
        steps = [out.logits]
        for place in range(6, 10):
            out = model(input_ids=PROMPT[:, place : place + 1], past_key_values=out.past_key_values)
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full)
    assert isinstance(out.past_key_values, JointCache) and type(cache) is DynamicCache


@pytest.mark.parametrize("name", ["xlora", "xcross"])
def test_prompt_lookup_gives_the_tokens_of_plain_decoding(name: str) -> None:
    """It crops the cache where a guess was wrong."""
    model = build(name)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(PROMPT)}
    plain = model.generate(PROMPT, use_cache=False, **options)
    assert torch.equal(model.generate(PROMPT, prompt_lookup_num_tokens=3, **options), plain)


def test_a_cache_goes_on_over_several_turns() -> None:
    model = build("xlora")
    options = {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(PROMPT, return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, PROMPT[:, :3]], 1)
    second = model.generate(longer, past_key_values=first.past_key_values, **options)
    assert torch.equal(second, model.generate(longer, **options))


def test_a_cache_that_grew_without_its_first_pass_is_an_error() -> None:
    model = build("xlora")
    cache = model(input_ids=PROMPT, use_cache=True, past_key_values=DynamicCache()).past_key_values
    with model.disable_adapter():
        cache = model(input_ids=PROMPT[:, :1], past_key_values=cache).past_key_values
    with pytest.raises(ContextError, match="holds 11 positions and its first pass 10"):
        model(input_ids=PROMPT[:, :1], past_key_values=cache)
