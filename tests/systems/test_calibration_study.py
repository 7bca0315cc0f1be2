"""The comparison of calibration: what each arm trains, one grid for all, and figures that are those of kept rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import calibration as study
from moa.monitor.calibration import calibration
from moa.runs import comparison
from tests.tiny_run import encoder_folder, rows, write_jsonl

pytestmark = pytest.mark.usefixtures("as_before")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the demo's, of tiny things."""
    home = tmp_path / "cache"
    encoder_folder(home / comparison.BASE)
    for stem in study.TASKS.values():
        (home / stem).parent.mkdir(exist_ok=True)
        for seed, side in enumerate(("train", "eval")):
            write_jsonl(home / f"{stem}.{side}.jsonl", rows(40, seed))
    for name, value in (("TRAINED", 10), ("VALIDATED", 8), ("TESTED", 12), ("RATES", (1e-3, 1e-2, 1e-1))):
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(comparison, "EPOCHS", 1)
    return home


def trained(trainings: study.Trainings, arm: str) -> set[str]:
    model = trainings.model(arm)
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad and "heads" not in name}


def test_an_arm_trains_what_its_name_says(cache: Path, tmp_path: Path) -> None:
    trainings = study.Trainings(cache, tmp_path)
    found = {arm: trained(trainings, arm) for arm in study.ARMS}
    assert found["LoRA"] == {"down", "up"}
    assert found["LoRA, A frozen"] == {"up"}
    assert found["hypernetwork"] == found["hypernetwork, A frozen"] == {"embedding", "weight", "bias"}
    assert found["heads only"] == set()
    everything = {name for name, _ in trainings.model("full fine-tuning").named_parameters()}
    assert found["full fine-tuning"] == {n.rpartition(".")[2] for n in everything if "heads" not in n}
    for arm in study.ARMS:
        heads = [p for name, p in trainings.model(arm).named_parameters() if "heads" in name]
        assert heads and all(p.requires_grad for p in heads), arm
    made = {arm: any("down" in name for name, _ in trainings.model(arm).named_parameters()) for arm in study.ARMS}
    assert made["hypernetwork"] and not made["hypernetwork, A frozen"]  # the layer of the network that emits A


def test_rows_of_training_validation_and_test_are_apart_and_the_same_for_all(cache: Path, tmp_path: Path) -> None:
    trainings = study.Trainings(cache, tmp_path)
    assert [len(task.train) for task in trainings.tasks] == [10, 10]
    assert [len(own) for own in trainings.held_out] == [8, 8]
    together = [*trainings.tasks[0].train["input_ids"], *trainings.held_out[0]["input_ids"]]
    again = study.Trainings(cache, tmp_path)
    assert [*again.tasks[0].train["input_ids"], *again.held_out[0]["input_ids"]] == together


def test_the_study_holds_what_its_kept_probabilities_say(cache: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    found = study.study(cache, work, range(2))
    assert set(found["arms"]) == set(study.ARMS) and found["steps"] == 2
    trainings = study.Trainings(cache, work / "probabilities")
    losses = {}
    for arm, row in found["arms"].items():
        assert set(row["validation"]) == {repr(rate) for rate in study.RATES}
        kept = [trainings.kept(arm, row["learning_rate"], seed) for seed in range(2)]
        for task in study.TASKS:
            for measure in study.MEASURES:
                own = [calibration(*run[task])[measure] for run in kept]
                assert row["calibration"]["tasks"][task][measure] == pytest.approx(own)
        each = [np.mean([calibration(*run[task])["brier"] for task in study.TASKS]) for run in kept]
        losses[arm] = np.mean(each)
        assert row["calibration"]["brier"]["mean"] == pytest.approx(losses[arm])
        assert row["calibration"]["brier"]["deviation"] == pytest.approx(np.std(each, ddof=1))
        hits = [(p.argmax(-1) == y).double().mean().item() for run in kept for p, y in run.values()]
        assert row["test"]["mean"] == pytest.approx(np.mean(hits))
        assert sum(row["calibration"]["bins"]["counts"]) == 2 * 2 * 12
    for arm, row in found["arms"].items():
        if arm != "LoRA":
            difference = row["calibration"]["brier_minus_lora"]
            assert difference["mean"] == pytest.approx(losses[arm] - losses["LoRA"])
            assert difference["low"] <= difference["mean"] <= difference["high"]
    assert json.loads((work / "comparison.json").read_text())["settings"]["tested"] == 12
