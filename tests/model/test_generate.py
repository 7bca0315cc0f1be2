"""Generation: greedy, beams, left padding, sequence routing through the cache.

Run: pytest tests/model/test_generate.py
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ContextError, ShapeError
from tests import models
from tests.laws import assert_close

REMIX = {"token": {}, "sequence": {"granularity": "sequence"}}


def build(kind: str = "llama", **options) -> moa.MoAModel:
    """Return a model whose experts are strong enough that their choice shows in the logits."""
    options = {"router": "remix", "n_experts": 6, "k": 2, "targets": "all-linear", **options}
    return models.randomise(moa.build(models.MODELS[kind][0](), **options), scale=0.5).eval()


def prompt_only(sequences: Tensor, mask: Tensor) -> Tensor:
    """Return the routing mask of the full forward: the prompt's real tokens, nothing generated."""
    looked_at = torch.zeros_like(sequences, dtype=torch.bool)
    looked_at[:, : mask.shape[1]] = mask.bool()
    return looked_at


def left_padded() -> tuple[Tensor, Tensor]:
    """Return ids and mask (2, 6), the first row padded by three on the left."""
    ids = torch.randint(2, models.VOCAB, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids * mask, mask


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("granularity", list(REMIX))
def test_a_left_padded_batch_equals_the_full_forward(kind, granularity):
    model, (ids, mask) = build(kind, **REMIX[granularity]), left_padded()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_dict_in_generate=True,
                         output_logits=True)  # fmt: skip
    full_mask = torch.cat([mask, torch.ones(2, 5, dtype=mask.dtype)], 1)
    with torch.no_grad():
        full = model(
            input_ids=out.sequences,
            attention_mask=full_mask,
            position_ids=(full_mask.cumsum(1) - 1).clamp(min=0),
            routing_mask=prompt_only(out.sequences, mask),
        ).logits
    assert_close(torch.stack(out.logits, 1), full[:, 5:-1], 1e-5)
    alone = model.generate(ids[:1, 3:], max_new_tokens=5, do_sample=False)
    assert alone[0].tolist() == out.sequences[0, 3:].tolist()


def test_the_mask_that_generate_infers_is_the_one_routers_see():
    model, (ids, mask) = build(granularity="sequence"), left_padded()
    told = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), told)


@pytest.mark.parametrize("granularity", list(REMIX))
def test_beams_with_a_cache_equal_beams_without(granularity):
    model, (ids, mask) = build(**REMIX[granularity]), left_padded()
    cached, plain = (
        model.generate(
            ids, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False, use_cache=use_cache,
            return_dict_in_generate=True, output_scores=True,
        )
        for use_cache in (True, False)
    )  # fmt: skip
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(cached.sequences_scores, plain.sequences_scores, 1e-5)


def test_beam_scores_are_those_of_the_full_forward():
    model, (ids, mask) = build(granularity="sequence"), left_padded()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=3, do_sample=False, length_penalty=0.0,
                         return_dict_in_generate=True, output_scores=True)  # fmt: skip
    full_mask = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    with torch.no_grad():
        logits = model(
            input_ids=out.sequences,
            attention_mask=full_mask,
            position_ids=(full_mask.cumsum(1) - 1).clamp(min=0),
            routing_mask=prompt_only(out.sequences, mask),
        ).logits
    log_p = logits.log_softmax(-1)[:, 5:-1].gather(-1, out.sequences[:, 6:, None]).squeeze(-1).sum(1)
    assert_close(out.sequences_scores, log_p, 1e-5)


def test_the_routing_of_a_sequence_is_kept_and_then_forgotten():
    model, (ids, mask) = build(granularity="sequence"), left_padded()
    with model.tracing() as trace:
        model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    first = next(iter(model.mixtures()))
    kept = [record.routing for record in trace if record.name == first]
    assert len(kept) == 4 and all(routing is kept[0] for routing in kept)
    assert model.context.frozen_routings is None
    other = model.generate(ids.flip(0), attention_mask=mask.flip(0), max_new_tokens=4, do_sample=False)
    again = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(other.flip(0), again)


def test_sampling_and_several_answers_per_prompt():
    model, (ids, mask) = build(granularity="sequence"), left_padded()
    out = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert out.shape == (4, 9)


@pytest.mark.parametrize("granularity", list(REMIX))
def test_an_encoder_decoder_generates_as_without_a_cache(granularity):
    model = build("t5", **REMIX[granularity])
    batch = models.seq2seq_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    cached, plain = (
        model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached, plain)
    out = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        full = model(**inputs, decoder_input_ids=out.sequences).logits
    assert_close(torch.stack(out.logits, 1), full[:, :-1], 1e-5)


def test_training_and_decoding_of_an_encoder_decoder_agree_on_the_routing():
    """With labels, a sequence router of the decoder sees what it will see when decoding: the start token."""
    model = build("t5", granularity="sequence")
    batch = models.seq2seq_batch()
    with torch.no_grad():
        told = model(**batch).logits
        decoder = torch.cat([torch.zeros(4, 1, dtype=torch.long), batch["labels"][:, :-1].clamp(min=0)], 1)
        given = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=decoder)
    counted = batch["labels"] != -100
    assert_close(given.logits[counted], told[counted], 1e-5)


def test_chunked_prefill_is_refused_for_sequence_routing():
    model = build(granularity="sequence")
    with pytest.raises(ShapeError, match="chunked prefill"):
        model.generate(torch.randint(2, 32, (1, 8)), max_new_tokens=2, do_sample=False, prefill_chunk_size=4)


def test_a_router_that_is_not_causal_does_not_generate():
    model = build()
    for _, branch in model.branches():
        branch.router.causal = False
    with pytest.raises(ContextError, match=r"cannot generate: the routing of model.layers.0.*13 more\) is not causal"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)


def test_an_encoder_says_that_it_cannot_generate():
    assert not build("bert").can_generate() and not build("vit").can_generate()
    assert build("llama").can_generate() and build("t5").can_generate()


def test_the_generation_config_is_the_bases():
    model = build()
    assert model.generation_config is model.base.generation_config
    model.generation_config.max_new_tokens = 2
    assert model.generate(torch.ones(1, 3, dtype=torch.long)).shape == (1, 5)
