"""A routing that leaves nothing to decide folds. Run: pytest tests/folding/test_only_expert.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import moa
from moa.errors import FoldError
from moa.recipes import RECIPES, Recipe
from tests import laws, models

ONLY = [name for name, recipe in RECIPES.items() if recipe.sums_to_one or name in ("fixed", "remix", "xlora")]
CHOICES = [(name, {"n_experts": 1, "k": 1}) for name in ONLY] + [("remix", {"n_experts": 3, "k": 3})]
DECIDING: list[tuple[str, dict[str, Any]]] = [
    ("xlora", {"n_experts": 1, "score": "raw"}),
    ("topk", {"n_experts": 1, "k": 1, "expert": "dylora", "ranks": (1, 2)}),
    ("hydra", {"gate": "branches"}),
    ("remix", {"n_experts": 3, "k": 2}),
    ("sigmoid", {"n_experts": 2, "k": 2}),
]


def built(name: str, options: dict[str, Any], folder: Path) -> moa.MoAModel:
    """Return a small decoder with a recipe, whose adapters are there already where it wants some."""
    if "k" not in RECIPES[name].__dataclass_fields__:
        options = {key: value for key, value in options.items() if key != "k"}
    if not RECIPES[name].wants_experts:
        return moa.build(models.llama(), name, rank=2, targets="attention", **options)
    get_peft_model(models.llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"])).save_pretrained(folder)
    return moa.build(models.llama(), name, experts=folder, train_experts=True, **options)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("name", "options"), CHOICES, ids=[f"{n}-{o['n_experts']}" for n, o in CHOICES])
def test_where_every_row_has_the_same_weights_it_folds(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The only expert of a softmax, or of weights with the sum 1, has the weight 1; ReMix with k = E draws them all."""
    model = models.randomise(built(name, options, tmp_path)).double()
    assert model.recipes[0][0].folds == "always"
    batch = models.lm_batch()
    expected = models.outputs_of(model, batch)
    base = models.outputs_of(models.llama().double(), batch)
    assert not torch.allclose(expected, base, atol=1e-3)
    laws.assert_close(models.outputs_of(model.merge_and_unload(), batch), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(("name", "options"), DECIDING, ids=[name for name, _ in DECIDING])
def test_where_rows_still_decide_it_does_not(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = models.randomise(built(name, options, tmp_path))
    recipe: Recipe = model.recipes[0][0]
    assert recipe.folds == "never"
    with pytest.raises(FoldError, match="depends on the input"):
        model.merge_and_unload()
