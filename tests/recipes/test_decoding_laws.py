"""Every way to decode gives the tokens of decoding without a cache, over every recipe.

Run: pytest tests/recipes/test_decoding_laws.py
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import moa
from moa.errors import ContextError, ShapeError
from tests import laws, models

WAYS: dict[str, dict[str, Any]] = {
    "cache": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "target": {"assistant": True},
}
PROMPT = torch.tensor([[5, 9, 7, 3, 5, 9, 7, 3, 11]])  # it repeats itself, so that there is something to look up


def decoded(model: moa.MoAModel, **options: Any) -> Tensor:
    """Return the tokens (1, 15) of greedy decoding."""
    if options.pop("assistant", False):
        options["assistant_model"] = models.llama(num_hidden_layers=1)
    tokens: Tensor = model.generate(PROMPT, max_new_tokens=6, do_sample=False, **options)
    return tokens


@laws.parametrize(laws.RECIPE_CASES)
def test_every_way_gives_the_same_tokens(name: str, variant: str) -> None:
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)), 0.4).eval()
    assert isinstance(model, moa.MoAModel)
    tasks = {"task_ids": torch.tensor([1])} if laws.needs_tasks(name) and variant != "mu" else {}
    if not all(branch.router.causal for _, branch in model.branches()):
        with pytest.raises(ContextError, match="not causal"):
            decoded(model, **tasks)
        return
    want = decoded(model, use_cache=False, **tasks)
    for way, options in WAYS.items():
        if way == "chunks" and variant == "sequence":
            with pytest.raises(ShapeError, match="chunked prefill"):
                decoded(model, **options, **tasks)
            continue
        assert torch.equal(decoded(model, **options, **tasks), want), way


@laws.parametrize(laws.RECIPE_CASES)
def test_a_mixture_assists_or_says_why_not(name: str, variant: str) -> None:
    """A base gets its own tokens with a mixture's proposals; a mixture of the same tasks hands them on."""
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)), 0.4).eval()
    assert isinstance(model, moa.MoAModel)
    if not all(branch.router.causal for _, branch in model.branches()):
        return
    base = models.llama()
    want = base.generate(PROMPT, max_new_tokens=6, do_sample=False)
    by_task = laws.needs_tasks(name) and variant != "mu"
    if by_task or variant == "sequence":
        says = r"merge_and_unload\(task_id\)" if by_task else "granularity='token'"
        with pytest.raises(ContextError, match=f"this mixture cannot assist.*{says}"):
            base.generate(PROMPT, max_new_tokens=6, do_sample=False, assistant_model=model)
    else:
        assert torch.equal(base.generate(PROMPT, max_new_tokens=6, do_sample=False, assistant_model=model), want)
    if not by_task:
        return
    one, other = (model.generate(PROMPT, max_new_tokens=6, do_sample=False, task_ids=torch.tensor([t])) for t in (0, 1))
    assert not torch.equal(one, other)
    proposed = proposals_of(model, task_ids=torch.tensor([1]))
    assert torch.equal(torch.cat([PROMPT, proposed], 1), other[:, : PROMPT.shape[1] + proposed.shape[1]])
    assert model.context.task_ids is None


@laws.parametrize(list(dict(reversed(laws.RECIPE_CASES)).items()))
def test_an_assistant_uses_the_chosen_expert(name: str, variant: str) -> None:
    """The expert chosen for a target is the one that proposes, where the assistant has it by its name."""
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)), 0.4).eval()
    assert isinstance(model, moa.MoAModel)
    n = min(branch.router.n_experts for _, branch in model.branches())
    with model.pin_expert(n - 1):
        want = decoded(model)
    for told in ({"adapter_ids": [n - 1]}, {"adapter_names": [str(n - 1)]}):
        proposed = proposals_of(model, **told)
        assert torch.equal(torch.cat([PROMPT, proposed], 1), want[:, : PROMPT.shape[1] + proposed.shape[1]])
    assert model.context.pinned is None
    if n > 1:
        assert not torch.equal(decoded(model, adapter_ids=[0]), want)


def test_an_assistant_without_the_chosen_expert_decides_by_itself() -> None:
    target = models.randomise(moa.build(models.llama(), "topk", n_experts=3, expert_names=["a", "b", "c"]), 0.4).eval()
    helper = models.randomise(moa.build(models.llama(), "topk", n_experts=3, expert_names=["c", "x", "y"]), 0.4).eval()
    for name, place in (("c", 0), ("b", None)):
        seen = []
        hook = helper.lm_head.register_forward_hook(lambda *_: seen.append(helper.context.pinned))  # type: ignore[union-attr]  # noqa: B023
        want = decoded(target, adapter_ids=[name])  # type: ignore[arg-type]
        assert torch.equal(decoded(target, adapter_ids=[name], assistant_model=helper), want)  # type: ignore[arg-type]
        hook.remove()
        assert seen and all((p is None) if place is None else (p.experts.tolist() == [place]) for p in seen)


def proposals_of(model: moa.MoAModel, **told: Any) -> Tensor:
    """Return the first tokens (1, n) that a mixture proposes to a copy of itself, which is told tasks or experts."""
    target, first = copy.deepcopy(model), []
    forward = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        first.append(out.sequences[:, PROMPT.shape[1] :])
        return out

    model.generate = generate  # type: ignore[method-assign]
    try:
        target.generate(PROMPT, max_new_tokens=6, do_sample=False, assistant_model=model, **told)
    finally:
        del model.generate
    return first[0]
