"""Everything is in a law, and the comparison can fail. Run: pytest tests/test_laws.py"""

from __future__ import annotations

import gc

import pytest
import torch

import moa
from moa.experts import FAMILIES, ExpertBank
from moa.recipes import RECIPES
from moa.routers import ROUTERS, LinearRouter, Router

from . import laws, models
from .laws import assert_close


def test_every_router_and_bank_of_the_package_is_in_a_law() -> None:
    """Found by walking the package; what no law of its own can hold for is reached by the recipes' laws."""
    made = {type(laws.make_bank(name, variant, 4, 4, 2, 2)) for name, variant in laws.BANK_CASES}
    assert made == set(laws.classes_below(ExpertBank))
    assert {name for name, _ in laws.ROUTER_CASES} | set(laws.FOLLOWING) == {
        cls.__name__ for cls in laws.classes_below(Router)
    }
    assert set(ROUTERS.values()) <= set(laws.classes_below(Router))
    assert {name for name, _ in laws.BANK_CASES} >= set(FAMILIES)
    assert {name for name, _ in laws.RECIPE_CASES} == set(RECIPES)


def test_what_is_in_no_law_of_its_own_is_in_a_recipe() -> None:
    reached = set()
    for name in ("mixlora", "topk"):
        model = moa.build(models.llama(num_hidden_layers=1), laws.small_recipe(name, "default"))
        reached |= {type(branch.router).__name__ for _, branch in model.branches()}
    assert set(laws.FOLLOWING) <= reached


def test_a_class_that_no_table_names_is_found() -> None:
    """Abstract ones are left out; a class of the package is found wherever it stands."""
    names = {cls.__name__ for cls in laws.classes_below(Router)}
    assert {"IdRouter", "PreviewRouter", "FollowRouter", "PrototypeRouter"} <= names
    assert not names & {"Router", "BalancedRouter", "TaskRouter"}
    members = {"__module__": "moa.routers.linear"}
    late = type("LateRouter", (LinearRouter,), members)
    assert late in laws.classes_below(Router)
    del late
    gc.collect()
    assert "LateRouter" not in {cls.__name__ for cls in laws.classes_below(Router)}


def test_the_comparison_fails_on_wrong_values() -> None:
    right = torch.randn(4, 3, dtype=torch.float64)
    assert_close(right, right)
    for wrong in (right * (1 + 1e-6), right + 1e-6, -right, right * float("nan"), right[:3], torch.zeros_like(right)):
        with pytest.raises(AssertionError):
            assert_close(wrong, right)
