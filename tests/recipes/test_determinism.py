"""The same seed on the same machine gives the same weights, bit for bit.

Run: pytest tests/recipes/test_determinism.py; a hundred steps, and a process of its own: -m slow
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import moa
from moa.recipes import Recipe
from moa.routers import LinearRouter
from tests import laws, models

from .recipe_laws import Subject
from .test_broken_recipes import with_router

cases = laws.parametrize(laws.RECIPE_CASES)


def trained(recipe: Recipe, steps: int, seed: int = 3) -> dict[str, Tensor]:
    """Return what a checkpoint holds after some steps from a seed."""
    torch.manual_seed(seed)
    model = moa.build(models.llama(num_hidden_layers=1), recipe).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = Subject(recipe).batch()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}


def repeats(recipe: Recipe, steps: int) -> None:
    """Two runs from one seed end with the same weights, bit for bit, and they have moved."""
    first, second, start = trained(recipe, steps), trained(recipe, steps), trained(recipe, 0)
    assert any(not torch.equal(first[name], start[name]) for name in first), "nothing was trained"
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} differs between two runs"


def digest(recipe: Recipe, steps: int) -> str:
    weights = trained(recipe, steps)
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


@cases
def test_ten_steps(name: str, variant: str) -> None:
    repeats(laws.small_recipe(name, variant), 10)


@pytest.mark.slow
@cases
def test_a_hundred_steps(name: str, variant: str) -> None:
    repeats(laws.small_recipe(name, variant), 100)


@pytest.mark.slow
@cases
def test_another_process(name: str, variant: str) -> None:
    """Sets and dicts that are ordered by hashes of text, which each process draws anew, decide nothing."""
    code = (
        "from tests import laws; from tests.recipes.test_determinism import digest; "
        f"print(digest(laws.small_recipe({name!r}, {variant!r}), 3))"
    )
    environ = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True)
    assert found.stdout.split()[-1] == digest(laws.small_recipe(name, variant), 3)


class CountsItsRuns(LinearRouter):
    runs = 0

    def forward(self, x: Tensor, context: moa.Context) -> moa.Routing:
        type(self).runs += 1
        return super().forward(x * (1 + 1e-6 * self.runs), context)


def test_a_router_that_remembers_other_runs_is_seen() -> None:
    with pytest.raises(AssertionError, match="differs between two runs"):
        repeats(with_router(CountsItsRuns), 3)
