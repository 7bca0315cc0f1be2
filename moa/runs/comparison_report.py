"""The demo's comparison over several seeds: its figures with their error bars, and as text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .comparison import ARMS, BLOCKS, EPOCHS, GRID, RATES, SCORED, SETTINGS, Arm, Comparison, Outcome, Setting
from .comparison import distance_between_tasks as distance
from .paired import paired_difference
from .progress import quiet

BASELINES = ("LoRA", "LoRA, told")  # what every arm is subtracted from


def compare(cache: Path, seeds: int, workers: int = 1, settings: Sequence[Setting] | None = None) -> dict[str, Any]:
    """Return what every arm scores in each setting, and its paired differences to the LoRAs.

    Args:
        cache: folder that `moa.runs.demo.prepare` filled.
        seeds: trainings of each arm, with other training rows, order and weights each.
        workers: processes that train at once, with one thread each: models this small gain little from more.
        settings: to compare in; None is both.
    """
    started = time.monotonic()
    settings = SETTINGS if settings is None else settings
    # the slowest first, so that none is left alone at the end
    jobs = [(setting, arm, seed) for seed in range(seeds) for arm in reversed(ARMS) for setting in settings]
    found: dict[tuple[str, str], dict[int, Outcome]] = {}
    with (
        tqdm(total=len(jobs), desc="comparing", unit="training", dynamic_ncols=True) as bar,
        get_context("spawn").Pool(workers, _begin, (cache,)) if workers > 1 else nullcontext() as pool,
    ):
        if pool is None:
            _begin(cache)
        for (setting, arm, seed), outcome in pool.imap_unordered(_train, jobs) if pool else map(_train, jobs):
            found.setdefault((setting.name, arm.name), {})[seed] = outcome
            bar.update()
    figures = {
        setting.name: measured(
            setting, {arm.name: [own for _, own in sorted(found[setting.name, arm.name].items())] for arm in ARMS}
        )
        for setting in settings
    }
    return {"settings": figures, "seeds": seeds, "seconds": time.monotonic() - started}


_own: list[Comparison] = []  # what this process trains with


def _begin(cache: Path) -> None:
    """Make a process ready to train."""
    quiet()
    torch.set_num_threads(1)
    _own[:] = [Comparison(cache)]


def _train(job: tuple[Setting, Arm, int]) -> tuple[tuple[Setting, Arm, int], Outcome]:
    setting, arm, seed = job
    return job, _own[0].outcome(setting, arm, RATES[setting.name][arm.name], seed)


def measured(setting: Setting, outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Return each arm's figures.

    Args:
        setting: that they were trained in.
        outcomes: arm -> one a seed.
    """
    right = {
        arm: [np.stack([outcome.right[task] for outcome in own]) for task in setting.tasks]  # (S, n) a task
        for arm, own in outcomes.items()
    }
    figures = {}
    for arm, own in outcomes.items():
        minus = {}
        for other in BASELINES:
            if other != arm and other in right:
                mean, half = paired_difference([a - b for a, b in zip(right[arm], right[other], strict=True)])
                minus[other] = {"mean": mean, "half": half}
        scores = {task: float(rows.mean()) for task, rows in zip(setting.tasks, right[arm], strict=True)}
        figures[arm] = {
            "learning_rate": RATES[setting.name][arm],
            "parameters": own[0].parameters,
            "accuracy": scores,
            "mean": sum(scores.values()) / len(scores),
            "minus": minus,
            "seconds": float(np.median([outcome.seconds for outcome in own])),
            "routing": _routing(setting, own[0]),
            "distance_between_tasks": float(np.mean([distance(outcome.routing) for outcome in own])),
        }
    return figures


def _routing(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """Return the shares of the experts by task in the last layer, where there is more than one."""
    layer, load = list(outcome.routing.items())[-1]
    if load.load.numel() < 2:
        return {}
    return {"layer": layer, **{task: load.by_task[t].tolist() for t, task in enumerate(setting.tasks)}}


def comparison_text(results: Mapping[str, Any]) -> str:
    """Return the comparison for the terminal: per setting the scores, the differences, what they say, and the routing.

    Args:
        results: what `compare` returns.
    """
    grid = ", ".join(f"{rate:g}" for rate in GRID)
    parts = [
        f"MiniLM's first {BLOCKS} blocks, all linear layers; LoRA has rank 64, a mixture 8 experts of rank 8. "
        f"{results['seeds']} seed{'s' * (results['seeds'] > 1)}, {EPOCHS} epochs, {SCORED} rows scored of each task.\n"
        f"Each arm's learning rate was picked beforehand, from the same grid ({grid}), with the same seeds, on rows "
        "that are not scored here: python -m experiments.demo_tuning\n"
        "±: half of a 95 % interval of the paired difference in points of accuracy, over "
        + ("seeds and rows" if results["seeds"] > 1 else "rows; --seeds 3 would show how much a seed changes")
        + ". One such interval in twenty misses."
    ]
    for setting in SETTINGS:
        figures = results["settings"][setting.name]
        parts += [_table(setting, figures), _verdict(figures), *_routings(setting, figures)]
    parts.append(f"{results['seconds']:.0f} s in all. Next: moa demo --model minilm trains one mixture to look at.")
    return "\n\n".join(parts)


def _table(setting: Setting, figures: Mapping[str, Any]) -> str:
    titles = [*setting.tasks, "mean", *(f"minus {name}" for name in BASELINES), "rate", "s"]
    widths = [max(len(title), 5) for title in titles]
    widths[-4:-2] = [max(width, 13) for width in widths[-4:-2]]
    names = max(map(len, figures))
    lines = [f"{setting.name}. {setting.about}"]
    lines.append("  ".join([" " * names, *(f"{t:>{w}}" for t, w in zip(titles, widths, strict=True))]))
    for name, row in figures.items():
        cells = [f"{100 * value:.1f}" for value in (*row["accuracy"].values(), row["mean"])]
        cells += [_difference(row["minus"][other]) if other in row["minus"] else "" for other in BASELINES]
        cells += [f"{row['learning_rate']:g}", f"{row['seconds']:.1f}"]
        lines.append("  ".join([f"{name:<{names}}", *(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))]))
    return "\n".join(lines)


def _difference(one: Mapping[str, float]) -> str:
    return f"{100 * one['mean']:+.1f} ±{100 * one['half']:.1f}"


def _verdict(figures: Mapping[str, Any]) -> str:
    """Return which arms the bars tell apart from each LoRA."""
    lines = []
    for other in BASELINES:
        found: dict[str, list[str]] = {"ahead of": [], "behind": [], "not told apart from": []}
        for name, row in figures.items():
            if other in row["minus"]:
                found[side(row["minus"][other])].append(name)
        lines += [f"{how} {other}: {'; '.join(names) or 'none'}" for how, names in found.items()]
    return "\n".join(lines)


def side(difference: Mapping[str, float]) -> str:
    """Return on which side of zero a difference is, with its bar."""
    if difference["mean"] > difference["half"]:
        return "ahead of"
    return "behind" if -difference["mean"] > difference["half"] else "not told apart from"


def _routings(setting: Setting, figures: Mapping[str, Any]) -> list[str]:
    parts = []
    width = max(map(len, setting.tasks))
    for name, row in figures.items():
        if row["routing"]:
            shares = [
                f"  {task:<{width}}  " + " ".join(f"{100 * share:3.0f}" for share in row["routing"][task])
                for task in setting.tasks
            ]
            parts.append(
                f"{name}: share of each expert in %, by task, in {row['routing']['layer']}; over all layers "
                f"{100 * row['distance_between_tasks']:.0f} % is routed otherwise in another task\n" + "\n".join(shares)
            )
    return parts
