"""The demo's comparison: who sees what, what the figures say, and where the learning rates come from.

Run: pytest tests/runs/test_comparison.py
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import demo_tuning
from moa.cli.main import main
from moa.monitor.statistics import LayerLoad
from moa.runs import comparison, comparison_report
from moa.runs.comparison import ARMS, GRID, RATES, SETTINGS, Comparison, Outcome, Setting
from moa.runs.downloads import VADER
from tests.tiny_run import encoder_folder, rows, write_jsonl

pytestmark = pytest.mark.usefixtures("as_before")
RESULTS = Path(__file__).parents[2] / "experiments" / "results"
TOGETHER, OPPOSED = SETTINGS
BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the demo's, of tiny things."""
    encoder_folder(tmp_path / comparison.BASE)
    for stem in {stem for setting in SETTINGS for stem, _ in setting.tasks.values()}:
        (tmp_path / stem).parent.mkdir(exist_ok=True)
        for seed, side in enumerate(("train", "eval")):
            values = rows(60, seed)
            for i, value in enumerate(values):
                good = value["label"] == "positive"
                value |= {"lenient": "yes" if good or i % 3 else "no", "strict": "yes" if good and i % 3 else "no"}
            write_jsonl(tmp_path / f"{stem}.{side}.jsonl", values)
    sized = tuple(dataclasses.replace(setting, rows=8) for setting in SETTINGS)
    for module in (comparison, comparison_report):
        monkeypatch.setattr(module, "SETTINGS", sized)
    monkeypatch.setattr(comparison, "SCORED", 12)
    monkeypatch.setattr(comparison, "BLOCKS", 2)
    monkeypatch.setattr(comparison, "EPOCHS", 1)
    return tmp_path


def texts(trained: Comparison, columns: Any) -> list[str]:
    return [trained.tokenizer.decode(ids) for ids in columns["input_ids"][:]]


def test_opposed_tasks_have_the_same_texts_and_other_answers(small: Path) -> None:
    trained = Comparison(small)
    setting = comparison.SETTINGS[1]
    lenient, strict = trained.tasks(setting, told=False, seed=3)
    for one, other in ((lenient.train, strict.train), (lenient.eval, strict.eval)):
        assert one["input_ids"][:] == other["input_ids"][:]
        pairs = set(zip(one["labels"][:], other["labels"][:], strict=True))
        assert {(1, 0)} < pairs and (0, 1) not in pairs, "who is strict says yes to nothing else"
    assert (len(lenient.train), len(lenient.eval)) == (8, 12) and lenient.labels == strict.labels == ["no", "yes"]
    told = trained.tasks(setting, told=True, seed=3)
    plain = trained.tokenizer("lenient: ")["input_ids"]
    assert [ids[len(plain) :] for ids in told[0].train["input_ids"][:]] == lenient.train["input_ids"][:]


def test_which_rows_are_trained_on_and_scored(small: Path) -> None:
    setting = comparison.SETTINGS[0]
    one, other = (Comparison(small).tasks(setting, False, seed)[0] for seed in (0, 1))
    assert one.eval["input_ids"][:] == other.eval["input_ids"][:], "the same for every seed: differences are paired"
    assert one.train["input_ids"][:] != other.train["input_ids"][:]
    trained = Comparison(small, held_out=True)
    held = trained.tasks(setting, False, 0)[0]
    files = {
        side: [json.loads(line)["text"] for line in (small / f"vader/tweets.{side}.jsonl").read_text().splitlines()]
        for side in ("train", "eval")
    }
    assert set(texts(trained, held.eval)) <= set(files["train"])
    drawn = texts(trained, held.train) + texts(trained, held.eval)
    assert len(drawn) == 20 and all(drawn.count(text) <= files["train"].count(text) for text in drawn)


def trained_labels(trained: Comparison, setting: Setting, name: str) -> np.ndarray:
    (task,) = [task for task in trained.tasks(setting, False, 0) if task.name == name]
    return np.array(task.eval["labels"][:])


@pytest.mark.parametrize("name", BY_NAME)
def test_every_arm_trains_and_is_scored(small: Path, name: str) -> None:
    trained = Comparison(small)
    setting = comparison.SETTINGS[1]
    outcome = trained.outcome(setting, BY_NAME[name], 1e-2, 0)
    again = trained.outcome(setting, BY_NAME[name], 1e-2, 0)
    for task in setting.tasks:
        assert outcome.right[task].shape == (12,) and set(outcome.right[task]) <= {0.0, 1.0}
        np.testing.assert_array_equal(outcome.right[task], again.right[task])
    if not BY_NAME[name].told and name != "poly":
        # right and labelled yes, or wrong and labelled no: the model said yes
        model_says = [outcome.right[t] == trained_labels(trained, setting, t) for t in setting.tasks]
        np.testing.assert_array_equal(*model_says)
    assert all(set(load.by_task) == {0, 1} for load in outcome.routing.values())
    distance = comparison.distance_between_tasks(outcome.routing)
    assert distance > 0 if name == "poly" else 0 <= distance <= 1


def test_the_demo_in_one_command(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOA_CACHE", str(small))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert (
        said.index("This uses:") < said.index(VADER.sha256) < said.index("A. tasks that") < said.index("B. tasks that")
    )
    assert all(said.count(f"\n{arm.name:<10}  ") == 2 for arm in ARMS), said
    results = json.loads((tmp_path / "runs" / "demo.json").read_text())
    assert results["seeds"] == 1 and set(results["settings"]["B"]) == set(BY_NAME)


def test_several_processes_find_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are fresh processes: they see what is passed to them, and none of a test's changes."""
    monkeypatch.undo()
    monkeypatch.setattr(comparison_report, "ARMS", ARMS[:1])
    setting = dataclasses.replace(OPPOSED, rows=8)
    one, two = (comparison_report.compare(small, 2, workers, [setting])["settings"]["B"]["LoRA"] for workers in (1, 2))
    assert one["accuracy"] == two["accuracy"] and one["minus"] == two["minus"]


def test_a_lora_and_the_mixtures_have_as_many_parameters(small: Path) -> None:
    trained, setting = Comparison(small), comparison.SETTINGS[0]
    counts = {name: trained.outcome(setting, arm, 1e-3, 0).parameters for name, arm in BY_NAME.items()}
    assert counts["LoRA"] == counts["LoRA, told"]
    for name in ("poly", "topk", "remix"):
        assert counts["LoRA"] <= counts[name] < 1.3 * counts["LoRA"]


def test_every_arm_is_scaled_alike() -> None:
    for arm in ARMS:
        if arm.name != "remix":  # its ω is 2 / √(k rank) over k experts
            assert arm.recipe.get("alpha", 2 * arm.recipe["rank"]) == 2 * arm.recipe["rank"]


def outcome(right: dict[str, list[float]], loads: list[list[float]]) -> Outcome:
    layer = LayerLoad(torch.tensor(loads).mean(0), 1.0, 1, by_task=dict(enumerate(torch.tensor(loads))))
    return Outcome({task: np.array(rows) for task, rows in right.items()}, {"layer": layer}, 1.5, 100)


def test_figures_and_what_they_say() -> None:
    tasks = list(OPPOSED.tasks)
    draw = np.random.default_rng(0)
    base = [[*(draw.random(150) < 0.5)] for _ in range(2)]
    better = [[max(a, b) for a, b in zip(one, draw.random(150) < 0.6, strict=True)] for one in base]
    outcomes = {}
    for name in BY_NAME:
        right = better if name in ("poly", "LoRA, told") else base
        loads = [[0.75, 0.25], [0.25, 0.75]] if name == "poly" else [[1.0]] * 2 if "LoRA" in name else [[0.5, 0.5]] * 2
        own = {task: [float(x) for x in rows] for task, rows in zip(tasks, right, strict=True)}
        outcomes[name] = [outcome(own, loads)] * 2
    figures = comparison_report.measured(OPPOSED, outcomes)
    gain = float(np.mean(better) - np.mean(base))
    assert figures["poly"]["minus"]["LoRA"]["mean"] == pytest.approx(gain)
    assert figures["topk"]["minus"]["LoRA"] == {"mean": 0.0, "half": 0.0}
    assert figures["poly"]["distance_between_tasks"] == pytest.approx(0.5)
    assert figures["poly"]["routing"] == {"layer": "layer", tasks[0]: [0.75, 0.25], tasks[1]: [0.25, 0.75]}
    assert figures["LoRA"]["routing"] == {}
    three = {f"{task}": [1.0, 0.0] for task in TOGETHER.tasks}
    loads = [[0.5, 0.5]] * 3
    together = comparison_report.measured(TOGETHER, {name: [outcome(three, loads)] * 2 for name in BY_NAME})
    text = comparison_report.comparison_text({"settings": {"A": together, "B": figures}, "seeds": 2, "seconds": 9.0})
    for said in (
        "ahead of LoRA: LoRA, told; poly\n",
        "ahead of LoRA, told: none\nbehind LoRA, told: LoRA; topk; remix\nnot told apart from LoRA, told: poly",
        "ahead of LoRA: none\nbehind LoRA: none\nnot told apart from LoRA: LoRA, told; poly; topk; remix",
        f"{100 * gain:+.1f} ±",
        "lenient   75  25",
        "50 % is routed otherwise in another task",
        "python -m experiments.demo_tuning",
    ):
        assert said in text, text


@pytest.mark.parametrize(("seeds", "said"), [(1, "1 seed, 3 epochs"), (2, "2 seeds, 3 epochs")])
def test_one_seed_is_said(seeds: int, said: str) -> None:
    right = {task: [1.0, 0.0, 1.0] for setting in SETTINGS for task in setting.tasks}
    settings = {
        s.name: comparison_report.measured(s, {n: [outcome(right, [[1.0]] * len(s.tasks))] * seeds for n in BY_NAME})
        for s in SETTINGS
    }
    text = comparison_report.comparison_text({"settings": settings, "seeds": seeds, "seconds": 1.0})
    assert said in text and ("over rows; --seeds 3" in text) == (seeds == 1)


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.02, 0.01, "ahead of"),
        (-0.02, 0.01, "behind"),
        (0.02, 0.03, "not told apart from"),
        (0, 0, "not told apart from"),
    ],
)
def test_which_side_of_zero(mean: float, half: float, said: str) -> None:
    assert comparison_report.side({"mean": mean, "half": half}) == said


def test_rates_are_those_of_the_tuning_run() -> None:
    found = json.loads((RESULTS / "demo_tuning.json").read_text())
    assert found["picked"] == RATES == demo_tuning.picked(found["runs"])
    tried = {(run["setting"], run["arm"], run["learning_rate"], run["seed"]) for run in found["runs"]}
    seeds = found["size"]["seeds"]
    assert len(tried) == len(found["runs"]) == len(SETTINGS) * len(ARMS) * len(GRID) * len(seeds)
    assert tuple(found["size"]["grid"]) == GRID and found["size"]["epochs"] == comparison.EPOCHS
    assert found["size"]["training_rows"] == {setting.name: setting.rows for setting in SETTINGS}


def test_picking_takes_the_best_mean_and_the_lower_of_two() -> None:
    def run(rate: float, seed: int, accuracy: float) -> dict[str, Any]:
        task = {"task": accuracy, "other": accuracy}
        return {"setting": "A", "arm": "LoRA", "learning_rate": rate, "seed": seed, "accuracy": task}

    runs = [run(1e-2, 0, 0.9), run(1e-2, 1, 0.5), run(3e-3, 0, 0.8), run(3e-3, 1, 0.8), run(1e-3, 0, 0.8)]
    assert demo_tuning.picked(runs) == {"A": {"LoRA": 1e-3}}
    assert demo_tuning.picked(runs[:-1]) == {"A": {"LoRA": 3e-3}}
