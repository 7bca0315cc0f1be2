"""`moa.compare`: grids, resuming, picking apart from the test, and its interval against scipy's bootstrap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moa
from moa.errors import ConfigError
from moa.monitor.compare import Scored, paired_bootstrap

GRID = (1e-3, 3e-3, 1e-2)
ARMS = {"LoRA": GRID, "a/b": GRID}


def trained(arm: str, rate: float, seed: int) -> Scored:
    """Return scores with a best rate of each arm on validation, and another one on the test."""
    draw = np.random.default_rng([seed, len(arm), round(1e6 * rate)])
    best = 3e-3 if arm == "LoRA" else 1e-2
    validation = {f"v{i}": float(draw.normal(rate == best, 0.1)) for i in range(20)}
    level = {1e-3: 5.0, 3e-3: 1.0, 1e-2: 2.0}[rate]
    return Scored(validation, {f"t{i}": float(draw.normal(level, 0.1)) for i in range(30)}, 7)


def test_validation_picks_and_the_test_is_that_of_the_picked_rate(tmp_path: Path) -> None:
    found = moa.compare(trained, ARMS, tmp_path, seeds=[0, 1], baseline="LoRA")
    lora, other = found["arms"]["LoRA"], found["arms"]["a/b"]
    assert (lora["learning_rate"], lora["at_edge"]) == (3e-3, False)
    assert (other["learning_rate"], other["at_edge"]) == (1e-2, True), "not the rate that the test likes best"
    own = [list(trained("LoRA", 3e-3, seed).test.values()) for seed in (0, 1)]
    assert lora["test"]["mean"] == pytest.approx(np.mean(own))
    means = [np.mean([list(trained("LoRA", rate, s).validation.values()) for s in (0, 1)]) for rate in GRID]
    assert lora["sensitivity"] == pytest.approx(max(means) - min(means))
    assert list(lora["validation"].values()) == pytest.approx(means)
    theirs = [list(trained("a/b", 1e-2, seed).test.values()) for seed in (0, 1)]
    minus = other["minus_baseline"]
    assert minus["mean"] == pytest.approx(np.mean(theirs) - np.mean(own))
    assert minus["low"] < minus["mean"] < minus["high"] and "minus_baseline" not in lora
    assert json.loads((tmp_path / "comparison.json").read_text()) == found


def test_the_interval_is_that_of_scipy() -> None:
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    scores = np.random.default_rng(1).exponential(size=(1, 80))
    found = paired_bootstrap(scores)
    theirs = bootstrap(
        (scores[0],), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found["low"] == pytest.approx(theirs.low, abs=0.01) and found["high"] == pytest.approx(theirs.high, abs=0.01)
    apart = np.array([[0.0] * 80, [1.0] * 80])  # of two seeds that differ the interval is as wide as they are
    assert paired_bootstrap(apart) == pytest.approx({"mean": 0.5, "low": 0.0, "high": 1.0})


def test_what_is_finished_is_not_trained_again(tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def counted(*job: Any) -> Scored:
        asked.append(job)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return trained(*job)

    with pytest.raises(KeyboardInterrupt):
        moa.compare(counted, ARMS, tmp_path, seeds=[0, 1], baseline="LoRA")
    found = moa.compare(counted, ARMS, tmp_path, seeds=[0, 1], baseline="LoRA")
    assert len(asked) == 13 and asked[4] == asked[5]
    assert found == moa.compare(trained, ARMS, tmp_path / "anew", seeds=[0, 1], baseline="LoRA")
    file = tmp_path / "LoRA-0.003-0.json"
    row = json.loads(file.read_text())
    file.write_text(json.dumps({**row, "test": {key: 100.0 for key in row["test"]}}))
    changed = moa.compare(counted, ARMS, tmp_path, seeds=[0, 1], baseline="LoRA")
    assert changed["arms"]["LoRA"]["test"]["mean"] > 50, "every number comes from the files"


def test_an_arm_without_a_grid_and_other_unfair_ways_are_refused(tmp_path: Path) -> None:
    def refused(message: str, arms: Any = ARMS, train: Any = trained, **changes: Any) -> None:
        options = {"seeds": [0], "baseline": "LoRA", **changes}
        with pytest.raises(ConfigError, match=message):
            moa.compare(train, arms, tmp_path / message[:9], **options)

    refused("arm 'a/b' needs a grid of at least 3", {"LoRA": GRID, "a/b": (1e-3,)})
    refused("needs a grid", {"LoRA": (1e-3, 1e-3, 1e-2)})
    refused("as many trainings", {"LoRA": GRID, "b": (*GRID, 0.1)})
    refused("above 0", {"LoRA": (0.0, 1e-3, 1e-2)})
    refused("no arm", {})
    refused("unknown arm 'lora'", baseline="lora")
    refused("each once", seeds=[1, 1])
    refused("'t' is in validation", train=lambda *job: Scored({"t": 1.0}, {"t": 1.0}, 1))
    refused("both need rows", train=lambda *job: Scored({"t": 1.0}, {}, 1))
    refused("is nan", train=lambda *job: Scored({"v": float("nan")}, {"t": 1.0}, 1))
    refused("took 3 steps", train=lambda arm, *job: Scored({"v": 1.0}, {"t": 1.0}, len(arm)), arms=ARMS)
    refused("other rows", train=lambda arm, *job: Scored({"v": 1.0}, {arm: 1.0}, 1))
    moa.compare(trained, ARMS, tmp_path / "kept", seeds=[0], baseline="LoRA", settings={"rows": 3})
    with pytest.raises(ConfigError, match="choose another folder"):
        moa.compare(trained, ARMS, tmp_path / "kept", seeds=[0], baseline="LoRA", settings={"rows": 4})
    (tmp_path / "kept" / "LoRA-0.003-0.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        moa.compare(trained, ARMS, tmp_path / "kept", seeds=[0], baseline="LoRA", settings={"rows": 3})
