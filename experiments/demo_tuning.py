"""The learning rates of the demo's arms: `python -m experiments.demo_tuning`. Needs what `moa demo --prepare` fetches.

Every arm has the same grid and the same seeds, which the demo does not use, and is scored on rows of the training files
that it was not trained on; the best mean accuracy wins, the lower rate where two are equal. About a quarter of an hour
of one core. Finished runs are kept in --work, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from experiments.bench.common import write
from moa.runs import comparison, demo
from moa.runs.progress import quiet

COMMAND = "python -m experiments.demo_tuning"
FIRST_SEED = 100


def picked(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return setting -> arm -> the learning rate of the best mean accuracy over seeds; ties go to the lower one."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in runs:
        own = scores.setdefault((run["setting"], run["arm"]), {})
        own.setdefault(run["learning_rate"], []).append(statistics.mean(run["accuracy"].values()))
    found: dict[str, dict[str, float]] = {}
    for (setting, arm), rates in scores.items():
        best = max(sorted(rates), key=lambda rate: round(statistics.mean(rates[rate]), 6))
        found.setdefault(setting, {})[arm] = best
    return found


def one_run(
    trained: comparison.Comparison, setting: comparison.Setting, arm: comparison.Arm, rate: float, seed: int
) -> dict[str, Any]:
    """Return what one training scores on held-out training rows."""
    outcome = trained.outcome(setting, arm, rate, seed)
    accuracy = {task: float(right.mean()) for task, right in outcome.right.items()}
    return {"setting": setting.name, "arm": arm.name, "learning_rate": rate, "seed": seed, "accuracy": accuracy}


def main() -> None:
    """Run what --work does not hold yet, and write experiments/results/demo_tuning.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=demo.cache_folder(), help="what `moa demo --prepare` filled")
    parser.add_argument("--work", type=Path, default=Path("runs/demo_tuning"), help="finished runs, to go on from")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", nargs="+", choices=[s.name for s in comparison.SETTINGS], default=["A", "B"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    options.work.mkdir(parents=True, exist_ok=True)
    trained = comparison.Comparison(options.cache, held_out=True)
    seeds = range(FIRST_SEED, FIRST_SEED + options.seeds)
    settings = [setting for setting in comparison.SETTINGS if setting.name in options.settings]
    runs = []
    for seed, rate, setting, arm in itertools.product(seeds, comparison.GRID, settings, comparison.ARMS):
        done = options.work / f"{setting.name}-{arm.recipe['router']}{'-told' * arm.told}-{rate:g}-{seed}.json"
        if not done.exists():
            run = one_run(trained, setting, arm, rate, seed)
            print(run, flush=True)
            done.write_text(json.dumps(run))
        runs.append(json.loads(done.read_text()))
    if len(settings) < len(comparison.SETTINGS):
        return  # a part: the other one may run beside it
    size = {
        "blocks": comparison.BLOCKS,
        "training_rows": {setting.name: setting.rows for setting in comparison.SETTINGS},
        "held_out_rows": comparison.SCORED,
        "epochs": comparison.EPOCHS,
        "batch": comparison.BATCH,
        "grid": comparison.GRID,
        "seeds": list(seeds),
    }
    write("demo_tuning", {"size": size, "picked": picked(runs), "runs": runs}, COMMAND)
    print(json.dumps(picked(runs), indent=2))


if __name__ == "__main__":
    main()
