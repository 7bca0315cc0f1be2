"""Whether every family learns: `python -m experiments.family_accuracy`. Needs what `moa demo --prepare` fetches.

Each family, one expert and 8 behind `topk` (whole weights: by task, behind `moelora`), on two tasks of the demo with a
head each, the same grid of learning rates and the same rows for all; beside it the heads alone on the frozen encoder.
The rate is picked on rows that are not trained on, and that rate is scored on the evaluation rows, over seeds that no
rate was picked on. Finished trainings are kept in --work: stop it at any time, or run it in slices, --minutes each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.bench.common import write
from moa.errors import NumericsError
from moa.experts import FAMILIES
from moa.runs import comparison, demo
from moa.runs.progress import quiet

COMMAND = "python -m experiments.family_accuracy"
WHOLE = ("boft", "dora", "oft")  # the rows of an example share a routing
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # vectors want larger steps than matrices
PICKED_ON, SEEDS = 100, 3
RANK = 8
TASKS = ("tweets", "sarcasm")
SETTING = comparison.Setting(
    "families",
    "two tasks, a head each",
    {name: comparison.SETTINGS[0].tasks[name] for name in TASKS},
    comparison.SETTINGS[0].rows,
)


@dataclass(frozen=True)
class Training:
    """One training: an arm at a rate.

    Args:
        arm: what is trained.
        rate: of learning.
        seed: of rows, order and weights.
        held_out: scored on training rows that were left out, to pick a rate.
    """

    arm: comparison.Arm
    rate: float
    seed: int
    held_out: bool

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.arm.name}-{self.rate:g}-{self.seed}"


def arms(names: Sequence[str]) -> list[comparison.Arm]:
    """Return the frozen probe, and one expert and 8 of each family."""
    found = [comparison.Arm("probe", {"router": "fixed", "n_experts": 1, "rank": 1, "train_experts": False})]
    for name in names:
        own = {"expert": name, **({"rank": RANK} if "rank" in FAMILIES[name].uses else {})}
        found.append(comparison.Arm(f"{name} 1", {"router": "fixed", "n_experts": 1, **own}))
        if name in WHOLE:
            found.append(comparison.Arm(f"{name} 8", {"router": "moelora", "n_experts": 8, **own}, by_task=True))
        else:
            found.append(comparison.Arm(f"{name} 8", {"router": "topk", "n_experts": 8, "k": 2, **own}))
    return found


class Trainings:
    """Trains what a folder does not hold yet, as long as there is time.

    Args:
        cache: what `moa demo --prepare` filled.
        work: folder of finished trainings.
        until: `time.monotonic()` after which none is begun.
    """

    def __init__(self, cache: Path, work: Path, until: float) -> None:
        self.work, self.until = work, until
        self.scored = {held_out: comparison.Comparison(cache, held_out) for held_out in (True, False)}

    def result(self, one: Training) -> dict[str, Any] | None:
        """Return what a training scores, or None where it is neither done nor time to do it."""
        path = self.work / f"{one.name}.json"
        if not path.exists():
            if time.monotonic() > self.until:
                return None
            found = self.train(one)
            print(f"{one.name}: {found}", flush=True)
            path.write_text(json.dumps(found))
        known: dict[str, Any] = json.loads(path.read_text())
        return known

    def train(self, one: Training) -> dict[str, Any]:
        """Return the accuracy of one training by task, and its parameters; one that diverges scores 0 and says so."""
        try:
            outcome = self.scored[one.held_out].outcome(SETTING, one.arm, one.rate, one.seed)
        except NumericsError as error:
            return {"accuracy": dict.fromkeys(TASKS, 0.0), "parameters": 0, "seconds": 0.0, "diverged": str(error)}
        accuracy = {task: float(right.mean()) for task, right in outcome.right.items()}
        return {"accuracy": accuracy, "parameters": outcome.parameters, "seconds": round(outcome.seconds, 1)}


def mean(result: dict[str, Any]) -> float:
    """Return the mean accuracy over tasks."""
    return statistics.mean(result["accuracy"].values())


def row_of(arm: comparison.Arm, trainings: Trainings) -> dict[str, Any] | None:
    """Return an arm's best rate and what it scores with it, or None where a training is missing."""
    tried = [(rate, trainings.result(Training(arm, rate, PICKED_ON, held_out=True))) for rate in GRID]
    if any(found is None for _, found in tried):
        return None
    best = max(tried, key=lambda one: (round(mean(one[1] or {}), 6), -one[0]))[0]
    scored = [trainings.result(Training(arm, best, seed, held_out=False)) for seed in range(SEEDS)]
    found = [one for one in scored if one is not None]
    if len(found) < len(scored):
        return None
    return {
        "rate": best,
        "held_out": {f"{rate:g}": mean(one or {}) for rate, one in tried},
        "accuracy": [one["accuracy"] for one in found],
        "mean": statistics.mean(map(mean, found)),
        "parameters": found[0]["parameters"],
    }


def gains(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the rows with what each has over the probe, seed by seed, and whether that is clearly above zero.

    Clear is a mean gain of more than twice its standard error over seeds; both read the same rows.
    """
    probe = [statistics.mean(one.values()) for one in rows["probe"]["accuracy"]]
    out = {}
    for name, row in rows.items():
        own = [statistics.mean(one.values()) - base for one, base in zip(row["accuracy"], probe, strict=True)]
        error = statistics.stdev(own) / len(own) ** 0.5
        gain = statistics.mean(own)
        out[name] = {**row, "over_probe": gain, "standard_error": error, "learns": gain > 2 * error and gain > 0}
    return out


def measured(names: Sequence[str], trainings: Trainings) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield each arm's name and row, those with one expert first: a slice is a whole part."""
    order = sorted(arms(names), key=lambda arm: (arm.name.endswith(" 8"), arm.name != "probe"))
    for arm in order:
        yield arm.name, row_of(arm, trainings)


def main() -> None:
    """Train what --work does not hold yet, and write experiments/results/family_accuracy.json once all is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=demo.cache_folder(), help="what `moa demo --prepare` filled")
    parser.add_argument("--work", type=Path, default=Path("runs/family_accuracy"), help="finished ones, to go on from")
    parser.add_argument("--families", nargs="+", default=sorted(FAMILIES), choices=sorted(FAMILIES))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no training is begun after that")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    options.work.mkdir(parents=True, exist_ok=True)
    trainings = Trainings(options.cache, options.work, time.monotonic() + 60 * options.minutes)
    found = dict(measured(options.families, trainings))
    rows = {name: row for name, row in found.items() if row is not None}
    if len(rows) < len(found):
        print(f"{len(rows)} of {len(found)} rows are whole: run it again for the others")
        sys.exit(1)
    size = {
        "grid": GRID,
        "seeds": SEEDS,
        "tasks": TASKS,
        "rows": SETTING.rows,
        "scored": comparison.SCORED,
        "rank": RANK,
    }
    whole = gains(rows)
    for name, row in whole.items():
        print(f"{name:16s} {row['mean']:.3f} {row['over_probe']:+.3f} ± {row['standard_error']:.3f} at {row['rate']:g}")
    chosen = "" if sorted(options.families) == sorted(FAMILIES) else f" --families {' '.join(options.families)}"
    print(write("family_accuracy", {"settings": size, "rows": whole}, COMMAND + chosen))


if __name__ == "__main__":
    main()
