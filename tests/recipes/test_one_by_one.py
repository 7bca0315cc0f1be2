"""A batch gives what its examples give one by one, over every recipe, in one stream of the batch and in several.

Run: pytest tests/recipes/test_one_by_one.py
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.monitor.statistics import RoutingStatistics
from moa.objective import Trace
from moa.objective.objective import log_prob_per_example
from moa.routers import FixedRouter
from moa.types import Context, Routing
from tests import laws, models

from .chosen_laws import choice_of
from .recipe_laws import Subject

recipes = laws.parametrize(laws.RECIPE_CASES)
kinds = pytest.mark.parametrize("kind", ["decoder", "encoder"])
Kind = Literal["decoder", "encoder"]
# what the recipe has beside streams: inside blocks, and on an encoder also behind the last
BESIDE = {"decoder": r".*(v_proj|down_proj)", "encoder": r".*(value|pooler\.dense)"}
STREAMED = {"decoder": ["q_proj"], "encoder": ["query"]}
LENGTHS = [3, 7, 5, 6]


def in_one(name: str, variant: str, kind: Kind) -> Any:
    """Return a model with only this recipe, in fp64."""
    return Subject(laws.small_recipe(name, variant), kind).trained().double().eval()


def beside_streams(name: str, variant: str, kind: Kind) -> Any:
    """Return a model with this recipe on some layers, which runs in two streams, in fp64."""
    recipe = laws.small_recipe(name, variant)
    targets = "ffn" if name == "mixlora" else BESIDE[kind]  # experts that are whole blocks
    if variant == "sequence":  # a pooler has no sequence to pool
        targets = targets.replace(r"|pooler\.dense", "")
    recipe = dataclasses.replace(recipe, targets=targets)
    streams = moa.make_recipe("xcross", n_experts=2, rank=2, targets=STREAMED[kind])
    base = models.llama() if kind == "decoder" else models.bert()
    model: Any = models.randomise(moa.build(base, [recipe, streams], modules_to_save=[]), 0.2)
    return model.double().eval()


def batch_of(model: Any) -> dict[str, Tensor]:
    """Return a batch of four examples, each of a task and a length of its own."""
    ids = models.token_batch(4, 7)["input_ids"].clamp(min=2)
    mask = torch.arange(7) < torch.tensor(LENGTHS).unsqueeze(1)
    by_task = any(laws.needs_tasks(recipe.name) for recipe, _ in model.recipes)
    n_tasks = min([laws.N_TASKS, *(getattr(recipe, "n_tasks", laws.N_TASKS) for recipe, _ in model.recipes)])
    tasks = {"task_ids": torch.tensor([2, 0, 1, 0]) % n_tasks} if by_task else {}
    return {"input_ids": ids * mask, "attention_mask": mask.long(), **tasks}


def one(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return a batch of one example without padding."""
    alone = {name: value[row : row + 1] for name, value in batch.items()}
    return {name: value[:, : LENGTHS[row]] if value.ndim > 1 else value for name, value in alone.items()}


@torch.no_grad()
def gives_one_by_one(model: Any, chosen: bool = False) -> None:
    """Whole and by its body, a batch gives what its examples give by themselves, with an expert for each if asked."""
    batch, choice = batch_of(model), choice_of(model) if chosen else None
    ids = {} if choice is None else {"adapter_ids": choice}
    together = model(**batch, **ids).logits
    if model.preview is None:
        entered = model.base.base_model(**batch, **ids).last_hidden_state
    for row, length in enumerate(LENGTHS):
        alone = one(batch, row)
        mine = {} if choice is None else {"adapter_ids": choice[row : row + 1]}
        want = model(**alone, **mine).logits
        got = together[row : row + 1]
        laws.assert_close(got[:, :length] if got.ndim > 2 else got, want, 1e-9, f"example {row}")
        if model.preview is None:
            want = model.base.base_model(**alone, **mine).last_hidden_state
            laws.assert_close(entered[row : row + 1, :length], want, 1e-9, f"the body's of example {row}")


@recipes
@kinds
def test_a_batch_is_its_examples(name: str, variant: str, kind: Kind) -> None:
    gives_one_by_one(in_one(name, variant, kind))


@recipes
@kinds
def test_a_batch_in_streams_is_its_examples(name: str, variant: str, kind: Kind) -> None:
    if name == "xcross":  # a model runs in one kind of streams
        return
    model = beside_streams(name, variant, kind)
    gives_one_by_one(model)
    gives_one_by_one(model, chosen=True)


@pytest.mark.parametrize("broken", ["the batch's rows", "no end", "example after example"])
def test_the_law_sees_wrong_rows(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Context.in_streams
    if broken == "example after example":
        monkeypatch.setattr("moa.types.in_streams", lambda values, n: values.repeat_interleave(n, 0))
    elif broken == "no end":
        monkeypatch.setattr(Context, "in_streams", lambda self, n: before(self, n) if n > 1 else self)
    else:
        monkeypatch.setattr(Context, "in_streams", lambda self, n: self)
    with pytest.raises((AssertionError, moa.errors.ShapeError)):
        gives_one_by_one(beside_streams("moelora", "default", "encoder"))


def traced(model: Any, batch: dict[str, Tensor]) -> Any:
    with torch.no_grad(), model.tracing() as trace:
        model(**batch)
    return trace


def test_what_is_counted_by_task_is_each_examples_own() -> None:
    """Loads by task, of a batch in streams: those of the tasks' examples by themselves."""
    model = beside_streams("moelora", "default", "decoder")
    batch = batch_of(model)
    together = RoutingStatistics(laws.N_TASKS)
    together.add(traced(model, batch), batch["task_ids"])
    apart = RoutingStatistics(laws.N_TASKS)
    for row in range(4):
        alone = one(batch, row)
        apart.add(traced(model, alone), alone["task_ids"])
    want = apart.summary()
    for layer, load in together.summary().items():
        assert load.by_task.keys() == want[layer].by_task.keys()
        for task, found in load.by_task.items():
            laws.assert_close(found, want[layer].by_task[task], 1e-9, f"{layer}, task {task}")


def test_the_choices_of_an_example_are_its_own() -> None:
    """log Q of each example, of a batch in streams: that of the example by itself, its choices being given."""
    rows = [torch.randn(2, 4, 7), torch.randn(2, 4, 1)]  # (n, B, S): of tokens, and of whole examples
    trace = Trace()
    for log_prob in rows:
        flat = log_prob.flatten(0, 1)
        routing = Routing(torch.ones(*flat.shape, 1), torch.zeros(*flat.shape, 1).long(), 3, log_prob=flat)
        trace.add(nn.Identity(), routing, None, FixedRouter(4, 3), 2)
    laws.assert_close(log_prob_per_example(trace, 4), sum(log_prob.sum((0, 2)) for log_prob in rows), 1e-6)


@pytest.mark.parametrize("name", ["moelora", "xlora", "remix"])
def test_recomputed_blocks_in_streams_see_their_own_rows(name: str) -> None:
    variant = next(v for n, v in laws.RECIPE_CASES if n == name)
    gradients = []
    for checkpointed in (False, True):
        model = beside_streams(name, variant, "decoder").train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        batch = batch_of(model)
        torch.manual_seed(5)
        loss = model(**batch, labels=batch["input_ids"]).loss
        if "task_ids" in batch:
            model(**{**batch, "task_ids": batch["task_ids"].flip(0)})
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for key, grad in plain.items():
        laws.assert_close(recomputed[key], grad, 1e-9, key)


@pytest.mark.parametrize("name", ["moelora", "xlora"])
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"use_cache": False}])
def test_prompts_in_streams_are_generated_one_by_one(name: str, ways: dict[str, Any]) -> None:
    variant = next(v for n, v in laws.RECIPE_CASES if n == name)
    model = beside_streams(name, variant, "decoder")
    batch = batch_of(model)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = models.token_batch(4, 7)["input_ids"].clamp(min=2)
    options = {"max_new_tokens": 4, "do_sample": False, **ways}
    together = model.generate(**batch, **options).unflatten(0, (4, -1))
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        assert torch.equal(together[row], model.generate(**alone, **options)), f"prompt {row}"
