"""The accuracy harness of families on trainings that are made up: rates, resuming, slices. Run: pytest tests"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments import family_accuracy, family_tables, table_text
from experiments.family_accuracy import GRID, PICKED_ON, SEEDS, Training, Trainings, gains, row_of
from moa.errors import NumericsError
from moa.experts import FAMILIES
from moa.recipes import make_recipe


class MadeUp(Trainings):
    """Scores by a formula: the third rate is best on what is held out, and one training can be the last."""

    def __init__(self, work: Path, most: int = 10**6) -> None:
        self.work, self.until, self.most, self.trained = work, float("inf"), most, []

    def train(self, one: Training) -> dict[str, Any]:
        self.trained.append(one)
        if len(self.trained) == self.most:
            self.until = time.monotonic() - 1
        best = 0.5 + 0.1 * (one.rate == GRID[2]) + 0.01 * (one.seed % 3) + 0.2 * (one.arm.name == "lora 1")
        return {"accuracy": {"a": best, "b": best}, "parameters": 7, "seconds": 0.0}


def test_a_rate_is_picked_on_other_rows_and_seeds_than_it_is_scored_on(tmp_path: Path) -> None:
    arm = family_accuracy.arms(["lora"])[1]
    trainings = MadeUp(tmp_path)
    row = row_of(arm, trainings)
    assert row is not None and row["rate"] == GRID[2] and row["parameters"] == 7
    assert [(one.rate, one.seed) for one in trainings.trained if one.held_out] == [(r, PICKED_ON) for r in GRID]
    scored = [(one.rate, one.seed) for one in trainings.trained if not one.held_out]
    assert scored == [(GRID[2], seed) for seed in range(SEEDS)] and PICKED_ON not in range(SEEDS)
    again = MadeUp(tmp_path)
    assert row_of(arm, again) == row and not again.trained, "finished trainings are kept"


def test_a_slice_ends_in_time_and_the_next_one_goes_on(tmp_path: Path) -> None:
    arm, first = family_accuracy.arms(["lora"])[1], MadeUp(tmp_path, most=3)
    assert row_of(arm, first) is None and len(first.trained) == 3
    second = MadeUp(tmp_path)
    assert row_of(arm, second) is not None and len(second.trained) == len(GRID) + SEEDS - 3


def test_what_is_clearly_above_the_probe(tmp_path: Path) -> None:
    rows = {arm.name: row_of(arm, MadeUp(tmp_path)) or {} for arm in family_accuracy.arms(["lora"])}
    found = gains(rows)
    assert found["lora 1"]["over_probe"] == pytest.approx(0.2) and found["lora 1"]["learns"]
    assert found["lora 8"]["over_probe"] == 0 and not found["lora 8"]["learns"] and not found["probe"]["learns"]
    rows["lora 8"]["accuracy"] = [{"a": 0.9}, {"a": 0.3}, {"a": 0.7}]
    assert not gains(rows)["lora 8"]["learns"], "a mean that is no larger than its error"


def test_a_training_that_diverges_scores_nothing_and_the_others_go_on(tmp_path: Path) -> None:
    class Diverging:
        def outcome(self, setting: Any, arm: Any, rate: float, seed: int) -> Any:
            if rate == GRID[-1]:
                raise NumericsError("the loss is not finite")
            right = {name: np.array([True, rate == GRID[1]]) for name in family_accuracy.TASKS}
            return SimpleNamespace(right=right, parameters=7, seconds=1.0)

    trainings = MadeUp(tmp_path)
    trainings.train = partial(Trainings.train, trainings)  # type: ignore[method-assign]
    trainings.scored = {True: Diverging(), False: Diverging()}  # type: ignore[dict-item]
    row = row_of(family_accuracy.arms(["lora"])[1], trainings)
    assert row is not None and row["rate"] == GRID[1] and row["mean"] == 1 and row["parameters"] == 7
    assert row["held_out"][f"{GRID[-1]:g}"] == 0
    assert "not finite" in json.loads((tmp_path / f"lora 1-{GRID[-1]:g}-{PICKED_ON}.json").read_text())["diverged"]


def test_every_family_has_both_arms() -> None:
    arms = {arm.name: arm for arm in family_accuracy.arms(sorted(FAMILIES))}
    assert len(arms) == 2 * len(FAMILIES) + 1
    for arm in arms.values():
        sizes = {"n_tasks": 2} if arm.by_task else {}
        recipe = make_recipe(**{**arm.recipe, **sizes})
        assert recipe.n_experts == (8 if arm.name.endswith(" 8") else 1)


def test_the_tables_of_both_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured, and the reason where something is not."""
    (tmp_path / "results").mkdir()
    for module in (family_tables, table_text):
        monkeypatch.setattr(module, "HERE", tmp_path)
    assert family_tables.family_costs().startswith("Not measured yet: `python -m experiments.family_figures`")
    about = {"command": "python -m experiments.x", "environment": {"commit": "abc1234"}}
    arm = {"over_probe": 0.0312, "standard_error": 0.012, "rate": 0.003, "learns": True}
    rows = {"probe": {"mean": 0.7}, "lora 1": arm, "lora 8": {**arm, "learns": False}}
    settings = {"tasks": ["a", "b"], "seeds": 3}
    (tmp_path / "results" / "family_accuracy.json").write_text(
        json.dumps({**about, "settings": settings, "rows": rows})
    )
    said = family_tables.family_learning()
    assert "| `lora` | +3.1 ± 1.2 | 0.003 | +3.1 ± 1.2, not clear | 0.003 |" in said and "probe has 70.0 %" in said
    costs = {"parameters": 1234, "step_over_base": 1.5, "peft_step_over_moa": None, "checkpoint_bytes": 9000}
    kinds = {"MiniLM": {"lora": {**costs, "saved_over_x": 0.5, "forward_64_over_4": 2.0}, "oft": {"error": "it broke"}}}
    (tmp_path / "results" / "families.json").write_text(json.dumps({**about, "rows": kinds}))
    said = family_tables.family_costs()
    assert "| `lora` | 1,234 | 1.50 | 0.50 |  |  |  | 9 | 2.00 |" in said and "`oft`: it broke." in said
    assert "`python -m experiments.x` at abc1234: [families.json](../experiments/results/families.json)" in said
