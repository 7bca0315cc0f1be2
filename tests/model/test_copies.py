"""A deep copy and a pickled model: the same numbers, nothing shared. Run: pytest tests/model/test_copies.py"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.mixture.streams import Cross, Fold
from moa.model.scope import ModelScope
from tests import laws, models
from tests.laws import assert_close

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}
recipes = pytest.mark.parametrize(("name", "variant"), laws.RECIPE_CASES)
ways = pytest.mark.parametrize("way", list(WAYS))


def build(name: str, variant: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a small decoder with random experts, and a batch with task ids where the recipe wants them."""
    model = models.randomise(moa.build(models.llama(), laws.small_recipe(name, variant)))
    batch = models.lm_batch(rows=3, length=6)
    if laws.needs_tasks(name):
        batch["task_ids"] = torch.arange(3) % laws.N_TASKS
    return model, batch


def step(model: Any, batch: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Take one step, and return the state afterwards."""
    torch.manual_seed(seed)
    learned = [p for p in model.parameters() if p.requires_grad]
    if learned:
        optimizer = torch.optim.SGD(learned, lr=0.1)
        model.train()(**batch).loss.backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def held(model: nn.Module) -> set[int]:
    """Return the ids of everything of a model that can change: modules, tensors, scopes, hooks."""
    things: list[Any] = [*model.modules(), *model.parameters(), *model.buffers()]
    for module in model.modules():
        things += [value for key, value in vars(module).items() if isinstance(value, (ModelScope, Tensor))]
        things += [h for h in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
        things += [h.streams for h in things if isinstance(h, (Fold, Cross))]
    return {id(thing) for thing in things}


def nothing_is_shared(model: nn.Module, twin: nn.Module) -> None:
    assert not held(model) & held(twin)
    storages = [
        {t.untyped_storage().data_ptr() for t in (*m.parameters(), *m.buffers()) if t.numel()} for m in (model, twin)
    ]
    assert not storages[0] & storages[1]


@recipes
@ways
def test_a_copy_computes_and_learns_the_same(name: str, variant: str, way: str) -> None:
    """Before and after a forward, which leaves a context behind."""
    model, batch = build(name, variant)
    fresh = WAYS[way](model.eval())
    before = models.outputs_of(model, batch)
    twin = WAYS[way](model)
    for one in (fresh, twin):
        assert type(one) is type(model)
        assert torch.equal(models.outputs_of(one, batch), before)
        nothing_is_shared(model, one)
    assert [recipe for recipe, _ in twin.recipes] == [recipe for recipe, _ in model.recipes]
    after = step(twin, batch)
    assert torch.equal(models.outputs_of(model.eval(), batch), before), "the copy's step moved the original"
    expected = step(model, batch)
    moved = [key for key, value in expected.items() if not torch.equal(value, fresh.state_dict()[key])]
    assert moved or not any(p.requires_grad for p in model.parameters())
    for key, value in expected.items():
        assert_close(after[key], value, 1e-6, key)
    assert torch.equal(models.outputs_of(fresh.eval(), batch), before)
    later = WAYS[way](model)  # between a training forward and whatever comes next
    assert torch.equal(models.outputs_of(later, batch), models.outputs_of(model, batch))
    nothing_is_shared(model, later)


@ways
@pytest.mark.parametrize("name", ["xlora", "xcross"])
def test_a_copy_lives_on_without_the_original(name: str, way: str) -> None:
    """What runs around the base (a first pass, streams) is the copy's own."""
    variant = next(v for n, v in laws.RECIPE_CASES if n == name)
    model, batch = build(name, variant)
    expected = models.outputs_of(model.eval(), batch)
    tokens = model.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    twin = WAYS[way](model)
    model.unload()
    assert torch.equal(models.outputs_of(twin, batch), expected)
    assert torch.equal(twin.generate(batch["input_ids"], max_new_tokens=3, do_sample=False), tokens)


def test_sharing_is_seen() -> None:
    model, _ = build("xcross", "default")
    twin = copy.deepcopy(model)
    twin.mixtures()[next(iter(twin.mixtures()))].scope = model.scope
    with pytest.raises(AssertionError):
        nothing_is_shared(model, twin)
    twin = copy.deepcopy(model)
    twin.base.model.norm.weight.data = model.base.model.norm.weight.data
    with pytest.raises(AssertionError):
        nothing_is_shared(model, twin)
    twin = copy.deepcopy(model)
    twin.base.model.register_forward_pre_hook(Fold(model.streams), with_kwargs=True)
    with pytest.raises(AssertionError):
        nothing_is_shared(model, twin)
