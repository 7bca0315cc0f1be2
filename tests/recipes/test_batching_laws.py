"""Continuous batching gives each request what it gets by itself, or is refused, over every recipe.

Run: pytest tests/recipes/test_batching_laws.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import moa
from moa.errors import ConfigError
from tests import laws, models

PROMPTS = [[5, 9, 7, 3, 5, 9, 7, 3, 11], [4, 8, 2, 6]]
REFUSED = {
    "expert_choice": "looks at a whole sequence",
    "soft": "looks at a whole sequence",
    "moelora": r"the task of a request: merge_and_unload\(task_id\)",
    "poly": r"the task of a request: merge_and_unload\(task_id\)",
    "mhr": r"the task of a request: merge_and_unload\(task_id\)",
    "xlora": "a first pass of the base",
    "remix-sequence": "looks at a whole sequence",
    "xcross": "2 streams that read each other",
}


def batched(model: moa.MoAModel, **options: Any) -> list[list[int]]:
    """Return the tokens of each request, in as small a cache as a CPU needs."""
    answers = model.generate_batch(
        PROMPTS,
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64),
        **options,
    )
    assert not [answer.error for answer in answers.values() if answer.error]
    return [answer.generated_tokens for answer in answers.values()]


@laws.parametrize(laws.RECIPE_CASES)
def test_each_request_gets_what_it_gets_by_itself(name: str, variant: str) -> None:
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)), 0.4).eval()
    assert isinstance(model, moa.MoAModel)
    says = None if (name, variant) == ("poly", "mu") else REFUSED.get(name, REFUSED.get(f"{name}-{variant}"))
    if says is not None:
        for call in (model.init_continuous_batching, model.continuous_batching_context_manager, lambda: batched(model)):
            with pytest.raises(ConfigError, match=says):
                call()
        if name not in ("expert_choice", "soft"):
            with pytest.raises(ConfigError, match=says):
                model.generate(torch.tensor(PROMPTS[:1]), cache_implementation="paged", max_new_tokens=4)
        return
    alone = [
        model.generate(torch.tensor([p]), max_new_tokens=4, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS
    ]
    assert batched(model) == alone


@pytest.mark.parametrize("block", ["disable_adapter", "pin_expert", "folded", "tracing"])
def test_what_holds_in_one_thread_is_not_lost_in_the_managers(block: str) -> None:
    model = moa.build(models.llama(), "fixed", n_experts=3)
    arguments = (1,) if block == "pin_expert" else ()
    with getattr(model, block)(*arguments), pytest.raises(ConfigError, match="a thread of its own"):
        batched(model)
