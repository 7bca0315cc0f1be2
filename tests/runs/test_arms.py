"""Recipes of a tiny configuration under `moa.compare`: what is trained, on which rows, and what each row scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import moa
from moa.errors import ConfigError
from moa.runs.arms import ConfiguredArms, RowScores
from moa.runs.config import parse
from moa.runs.session import Run
from tests.tiny_run import config_values, decoder_folder, encoder_folder

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
RECIPES = {
    "LoRA": {"router": "fixed", "n_experts": 1, "rank": 4, "targets": "all-linear"},
    "topk": {"router": "topk", "n_experts": 4, "k": 2, "rank": 2, "targets": "all-linear"},
}


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_each_row_scores_what_the_run_scores(tmp_path: Path, kind: str) -> None:
    base = (encoder_folder if kind == "classification" else decoder_folder)(tmp_path / "base")
    values = config_values(tmp_path, base, kind)
    values["training"] |= {"num_train_epochs": 6}
    config = parse(values)
    arms = ConfiguredArms(config, RECIPES, validation_fraction=0.25)
    found = arms("topk", 3e-2, 3)
    assert found == arms("topk", 3e-2, 3) and found != arms("topk", 3e-2, 4)
    assert len(found.validation) == 2 * 8 and len(found.test) == 2 * 12
    assert found.steps == 6 * (2 * 24 // 8), "six epochs of what is not held out"
    run = Run(dataclasses.replace(config, seed=3), arms.tasks, arms.tokenizer)
    kept = [task.train.select(own) for task, (own, _) in zip(arms.tasks, arms.splits, strict=True)]
    model = run.fit_recipe(3e-2, RECIPES["topk"], kept)
    for side, rows in (
        ("eval", None),
        ("train", [t.train.select(h) for t, (_, h) in zip(arms.tasks, arms.splits, strict=True)]),
    ):
        scores = run.evaluate(model, rows=rows)
        for task in ("first", "second"):
            own = [
                score for row, score in {**found.test, **found.validation}.items() if row.startswith(f"{task}/{side}/")
            ]
            assert sum(own) / len(own) == pytest.approx(scores[task]["accuracy"])
    assert 0 < sum(found.test.values()) < 24, "some are right, some wrong"
    with pytest.raises(ConfigError, match="unknown arm 'lora'"):
        arms("lora", 1e-2, 0)


def test_a_configuration_is_compared(tmp_path: Path) -> None:
    values = config_values(tmp_path, encoder_folder(tmp_path / "base"))
    values["training"] |= {"max_steps": 2}
    grid = dict.fromkeys(RECIPES, (1e-3, 1e-2, 3e-2))
    found = moa.compare(ConfiguredArms(parse(values), RECIPES), grid, tmp_path / "work", seeds=[0], baseline="LoRA")
    assert found["steps"] == 2 and set(found["arms"]) == set(RECIPES)
    assert len(list((tmp_path / "work").glob("*-0.json"))) == 6
    assert not (tmp_path / "run").exists(), "no run is left behind"


def test_numbers_and_texts_score_minus_their_loss() -> None:
    def scored(kind: str, kept: list[np.ndarray], labels: np.ndarray) -> tuple[list[float], dict[str, float]]:
        measures = RowScores(SimpleNamespace(kind=kind, labels=["a", "b"]))  # type: ignore[arg-type]
        found = measures.scores(kept, labels)
        return measures.rows, found

    guess, truth = np.array([[1.0, 2.0], [0.0, 4.0]]), np.array([[1.0, 0.0], [3.0, 4.0]])
    rows, found = scored("regression", [guess, np.zeros(2)], truth)
    assert rows == [-2.0, -4.5] and found["loss"] == 3.25
    labels = np.array([[5, 1, 2, -100], [5, 3, -100, -100]])
    rows, found = scored("text", [np.zeros((2, 4), int), np.array([4.0, 1.0])], labels)
    assert rows == [-2.0, -1.0] and found["loss"] == pytest.approx(5 / 3)
