"""A compiled mixture takes batches of any length, as the same base with peft's LoRA does.

Run: pytest tests/recipes/test_compiled_lengths.py; every recipe, training and evaluation: -m slow
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import pytest
import torch
from torch import nn

import moa
from moa.recipes import RECIPES, Recipe
from moa.routers import LinearRouter
from tests import laws, models

from .test_broken_recipes import with_router
from .test_recipe_laws import compiling

# peft reads a property that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LENGTHS = (8, 9, 12, 17, 40)
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def graphs(model: Any, parts: Sequence[nn.Module], training: bool, **extra: torch.Tensor) -> int:
    """Return how many graphs a model makes for batches of all lengths, its parts compiled, each by itself."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    torch._dynamo.reset()
    for part in parts:
        part.compile(backend=backend)
    model.train(training)
    for length in LENGTHS:
        ids = torch.randint(3, models.VOCAB, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.set_grad_enabled(training):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **extra).loss
        if training:
            loss.backward()
    assert made, "nothing was compiled"
    return len(made)


def of_peft(training: bool) -> int:
    """Return how many graphs peft's LoRA makes, the whole model compiled."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)  # type: ignore[attr-defined]
    model = peft.get_peft_model(models.llama(num_hidden_layers=1), config)  # type: ignore[attr-defined]
    return graphs(model, [model], training)


def no_more_than_peft(recipe: Recipe, training: bool, **extra: torch.Tensor) -> None:
    """A recipe's model, compiled whole, makes no more graphs over the lengths than peft's LoRA."""
    model = moa.build(models.llama(num_hidden_layers=1), recipe)
    ours, theirs = graphs(model, [model], training, **extra), of_peft(training)
    assert ours <= theirs, f"{ours} graphs for {len(LENGTHS)} lengths, and peft's LoRA makes {theirs}"


@pytest.mark.slow
@laws.parametrize(laws.RECIPE_CASES)
@MODES
@compiling
def test_every_recipe(name: str, variant: str, training: bool) -> None:
    if training and name == "remix":
        pytest.skip("its selections start from one random state of the host, which no graph holds: it breaks there")
    tasks = {"task_ids": torch.tensor([0, 1])} if laws.needs_tasks(name) else {}
    no_more_than_peft(laws.small_recipe(name, variant), training, **tasks)


@compiling
def test_training_with_a_balance_loss() -> None:
    no_more_than_peft(laws.small_recipe("topk", "default", targets=["q_proj", "v_proj"]), True)


def by_block(name: str, n_blocks: int, training: bool) -> int:
    """Return how many graphs a recipe's blocks make, each compiled by itself."""
    model: Any = moa.build(blocks(n_blocks), laws.small_recipe(name, "default"))
    tasks = {"task_ids": torch.tensor([0, 1])} if laws.needs_tasks(name) else {}
    return graphs(model, model.base.model.layers, training, **tasks)


def blocks(number: int) -> nn.Module:
    """Return a model without a cache: its layers have other states, and compiled code other guards, block by block."""
    model = models.llama(num_hidden_layers=number)
    model.config.use_cache = False
    return model


@compiling
def test_training_with_each_block_compiled_by_itself() -> None:
    """Blocks share their graphs as those of peft's LoRA do: past eight, torch runs the rest without compiling."""
    config = peft.LoraConfig(target_modules="all-linear", r=2)  # type: ignore[attr-defined]
    theirs: Any = peft.get_peft_model(blocks(4), config)  # type: ignore[attr-defined]
    assert by_block("topk", 4, True) <= graphs(theirs, theirs.base_model.model.model.layers, True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@MODES
# X-Cross notes, outside of any graph, where its streams end
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin:UserWarning")
@compiling
def test_blocks_compiled_by_themselves_share_their_graphs(name: str, training: bool) -> None:
    """A first, a middle and a last one make them all."""
    assert by_block(name, 5, training) == by_block(name, 3, training)


class TiedToALength(LinearRouter):
    def forward(self, x: torch.Tensor, context: Any) -> Any:
        known = {x.shape[1]: x}  # a key is hashed, which fixes it
        return super().forward(known[x.shape[1]], context)


@pytest.mark.slow
@compiling
def test_a_router_tied_to_a_length_is_seen() -> None:
    with pytest.raises(AssertionError, match="graphs for 5 lengths"):
        no_more_than_peft(with_router(TiedToALength), True)
