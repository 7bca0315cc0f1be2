"""What commands print of every recipe, those without k included. Run: pytest tests/cli/test_every_recipe.py"""

from __future__ import annotations

from pathlib import Path

import pytest

import moa
from moa.cli.main import main
from moa.runs.summary import RunResult, summary
from tests import laws, models

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@pytest.mark.parametrize(("name", "variant"), laws.RECIPE_CASES)
def test_a_recipe_is_described(name: str, variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = moa.build(models.llama(), laws.small_recipe(name, variant))
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    recipe = model.recipes[0][0].to_dict()
    results = {
        "recipe": recipe,
        "parameters": {"active": 1, "experts": 2, "routers": 3},
        "tasks": {"mine": {"evaluation_rows": 4, "majority": None}},
        "scores": {"mixture": {"mine": {"accuracy": 0.5, "loss": 0.7}}},
        "seconds": {"training": 1.0, "total": 2.0},
    }
    said = summary(RunResult(tmp_path, results, ""))
    k = f", k = {recipe['k']}" if "k" in recipe else ""
    assert said.startswith(f"{name}, {recipe['n_experts']} experts{k}: 1 of 2")
    assert f"recipe {name}: " in capsys.readouterr().out
