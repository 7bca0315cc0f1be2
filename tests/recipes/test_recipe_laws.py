"""The laws over every recipe. Run: pytest tests/recipes/test_recipe_laws.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moa
from moa.errors import ConfigError, ShapeError
from moa.recipes import RECIPES
from tests import laws, models

from . import recipe_laws
from .compile_law import blocks_in_one_graph, compiles, whole_model
from .recipe_laws import Subject

recipes = laws.parametrize(laws.RECIPE_CASES)
both = pytest.mark.parametrize("kind", ["decoder", "encoder"])


def compiling(test: Any) -> Any:
    """Ignore what torch's own compiler does and then warns about."""
    for message in (
        ".*Function.* should not be instantiated:DeprecationWarning",
        "The .grad attribute of a Tensor that is not a leaf:UserWarning",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{message}")(test)
    return test


def subject_of(name: str, variant: str, kind: str = "decoder") -> Subject:
    return Subject(laws.small_recipe(name, variant), kind)  # type: ignore[arg-type]


@recipes
@both
def test_training_lowers_the_loss_and_leaves_the_base(name: str, variant: str, kind: str) -> None:
    recipe_laws.trains_only_what_it_adds(subject_of(name, variant, kind))


@recipes
@both
def test_every_routing_is_monitored(name: str, variant: str, kind: str) -> None:
    recipe_laws.is_monitored(subject_of(name, variant, kind))


@recipes
@both
def test_every_trainable_parameter_gets_a_gradient(name: str, variant: str, kind: str) -> None:
    recipe_laws.reaches_every_parameter(subject_of(name, variant, kind))


@recipes
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_the_same_gradients(name: str, variant: str, reentrant: bool) -> None:
    recipe_laws.recomputes_the_same(subject_of(name, variant), reentrant)


@recipes
def test_cached_generation_equals_the_full_forward(name: str, variant: str) -> None:
    recipe_laws.generates_from_a_cache(subject_of(name, variant))


@recipes
@compiling
def test_compiled_blocks_are_the_same(name: str, variant: str) -> None:
    compiles(subject_of(name, variant), blocks_in_one_graph)


@pytest.mark.parametrize("name", ["mixlora", "xlora", "xcross"])
@compiling
def test_a_compiled_model_is_the_same(name: str) -> None:
    """The recipes whose layers share something; a gate for each layer is in tests/model."""
    compiles(subject_of(name, "default"), whole_model)


@recipes
@both
def test_save_and_load_bit_for_bit(name: str, variant: str, kind: str, tmp_path: Path) -> None:
    recipe_laws.saves_bit_for_bit(subject_of(name, variant, kind), tmp_path)


@recipes
@both
def test_it_folds_as_it_declares(name: str, variant: str, kind: str) -> None:
    recipe_laws.folds_as_declared(subject_of(name, variant, kind))


@recipes
def test_deep_copy_is_equal_and_independent(name: str, variant: str) -> None:
    recipe_laws.copies_apart(subject_of(name, variant))


@recipes
@pytest.mark.parametrize("kind", list(models.MODELS))
def test_fresh_model_equals_its_base(name: str, variant: str, kind: str) -> None:
    """In every kind of model; a recipe that does not work on a kind says so."""
    make, make_batch = models.MODELS[kind]
    options = {} if RECIPES[name]().targets == "all-linear" else {"targets": "all-linear"}
    recipe = laws.small_recipe(name, variant, **options)
    if (name, kind) in laws.REFUSED:
        with pytest.raises(ConfigError, match=laws.REFUSED[name, kind]):
            moa.build(make(), recipe)
        return
    if variant == "sequence" and kind in ("plain", "bert"):  # rows without a sequence, as BERT's pooler has
        with pytest.raises(ShapeError, match="use granularity='token'"):
            models.outputs_of(moa.build(make(), recipe), make_batch())
        return
    tasks = {"task_ids": torch.arange(4) % laws.N_TASKS} if laws.needs_tasks(name) else {}
    recipe_laws.starts_as_its_base(moa.build(make(), recipe), make(), make_batch(), tasks)
