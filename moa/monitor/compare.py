"""Methods compared as they should be: each with its own learning rate, over seeds, picked apart from the test.

He et al. 2026, arXiv 2601.22708: a learning rate that was tuned for one method only decides most comparisons.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, unknown_name

SUMMARY, SETTINGS = "comparison.json", "settings.json"
LEAST_RATES = 3
RESAMPLES = 10_000


@dataclass(frozen=True)
class Scored:
    """What one training came to.

    Args:
        validation: row -> its score, the larger the better, e.g. 1 where the answer is right, or minus its loss.
        test: the same of rows that are not among those of validation.
        steps: optimizer steps that it took.
    """

    validation: Mapping[str, float]
    test: Mapping[str, float]
    steps: int


def compare(
    train: Callable[[str, float, int], Scored],
    arms: Mapping[str, Sequence[float]],
    folder: str | Path,
    *,
    seeds: Sequence[int],
    baseline: str,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what each method scores at the learning rate that validation picks, and its difference to the baseline.

    Every method trains at each of its learning rates with each seed. Finished trainings are kept in the folder, one
    JSON file each, and not repeated; all that is returned comes from these files, and lies in comparison.json, too.

    Args:
        train: (arm, learning rate, seed) -> `Scored`.
        arms: name -> its learning rates, at least 3, as many for every arm.
        folder: of the finished trainings.
        seeds: of every arm and rate.
        baseline: the arm that the others are subtracted from, on the same test rows and seeds.
        settings: what else the scores depend on, as JSON has it; a folder of other settings is refused.

    Returns:
        "arms": name -> "learning_rate" (picked: best mean validation score, the lower one of equals), "at_edge" (it is
        the lowest or highest of the grid: widen it), "validation" (by rate), "sensitivity" (best minus worst of these),
        "test" ("mean", "low", "high" at the picked rate) and "minus_baseline" (likewise, paired). low and high are the
        95 % interval of the bootstrap over rows and seeds. "seeds", "baseline", "steps", "settings".

    Raises:
        ConfigError: an arm without a grid or with another size of it, a rate or a seed twice, an unknown baseline, a
            folder of other settings or a file in it that cannot be read; trainings of unequal steps, rows that are in
            validation and test, other rows than those of the other trainings, a score that is not finite.
    Source: Owen 2007, doi 10.1214/07-AOAS122, for resampling rows and seeds, each with replacement; percentiles.
    """
    check_grids(arms)
    if baseline not in arms:
        raise ConfigError(unknown_name("arm", baseline, arms, "baseline"))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be given, each once, got {list(seeds)}.")
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    _same_settings(home, dict(settings or {}))
    found: dict[tuple[str, float], list[Scored]] = {}
    first: tuple[str, Scored] | None = None
    for seed in seeds:  # all arms with one seed before the next: what is stopped early is a comparison already
        for arm, rates in arms.items():
            for rate in rates:
                file = home / f"{quote(arm, safe='')}-{rate!r}-{seed}.json"
                scored = _read(file) if file.exists() else train(arm, rate, seed)
                first = first or (file.name, scored)
                _check(file.name, scored, *first)
                if not file.exists():
                    _write(file, {"arm": arm, "learning_rate": rate, "seed": seed, **asdict(scored)})
                found.setdefault((arm, rate), []).append(_read(file))
    assert first is not None
    result = {
        "arms": _summary(arms, found, baseline),
        "baseline": baseline,
        "seeds": list(seeds),
        "steps": first[1].steps,
        "settings": dict(settings or {}),
    }
    _write(home / SUMMARY, result)
    return result


def check_grids(arms: Mapping[str, Sequence[float]]) -> None:
    """Check that every arm has a grid of learning rates, and all the same number of them.

    Raises:
        ConfigError: one lacks it, or repeats a rate, or has more or fewer than the others.
    """
    for arm, rates in arms.items():
        if len(set(rates)) < max(LEAST_RATES, len(rates)):
            raise ConfigError(
                f"arm {arm!r} needs a grid of at least {LEAST_RATES} different learning rates, got {list(rates)}: a "
                "method that is not tuned cannot be compared."
            )
        if not all(math.isfinite(rate) and rate > 0 for rate in rates):
            raise ConfigError(f"arm {arm!r}: learning rates must be above 0, got {list(rates)}.")
    sizes = {arm: len(rates) for arm, rates in arms.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"every arm gets as many trainings, and the grids have {sizes} learning rates.")
    if not sizes:
        raise ConfigError("there is no arm to compare.")


def paired_bootstrap(scores: NDArray[np.float64], share: float = 0.95) -> dict[str, float]:
    """Return the mean of scores, and the ends of its percentile interval over resampled rows and seeds.

    Args:
        scores: (S, n) of S seeds and n rows, e.g. differences of two methods on the same rows.
        share: of the interval.
    """
    rng = np.random.default_rng(0)
    n_seeds, n_rows = scores.shape
    by_seed = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), RESAMPLES) / n_seeds  # (R, S)
    by_row = rng.multinomial(n_rows, np.full(n_rows, 1 / n_rows), RESAMPLES) / n_rows  # (R, n)
    means = ((by_seed @ scores) * by_row).sum(1)  # (R,)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return {"mean": float(scores.mean()), "low": float(low), "high": float(high)}


def _summary(
    arms: Mapping[str, Sequence[float]], found: Mapping[tuple[str, float], list[Scored]], baseline: str
) -> dict[str, Any]:
    validation = {
        key: float(np.mean([np.mean(list(s.validation.values())) for s in runs])) for key, runs in found.items()
    }
    picked = {arm: max(sorted(rates), key=lambda rate: validation[arm, rate]) for arm, rates in arms.items()}
    rows = list(found[baseline, picked[baseline]][0].test)
    test = {arm: np.array([[s.test[row] for row in rows] for s in found[arm, picked[arm]]]) for arm in arms}
    out: dict[str, Any] = {}
    for arm, rates in arms.items():
        own = {repr(rate): validation[arm, rate] for rate in sorted(rates)}
        out[arm] = {
            "learning_rate": picked[arm],
            "at_edge": picked[arm] in (min(rates), max(rates)),
            "validation": own,
            "sensitivity": max(own.values()) - min(own.values()),
            "test": paired_bootstrap(test[arm]),
        }
        if arm != baseline:
            out[arm]["minus_baseline"] = paired_bootstrap(test[arm] - test[baseline])
    return out


def _check(name: str, scored: Scored, first_name: str, first: Scored) -> None:
    """Check what one training says, against the first one."""
    both = set(scored.validation) & set(scored.test)
    if both or not scored.validation or not scored.test:
        raise ConfigError(
            f"{name}: row {min(both)!r} is in validation and in test: learning rates may not be picked on the test."
            if both
            else f"{name}: validation and test both need rows."
        )
    for row, score in (*scored.validation.items(), *scored.test.items()):
        if not math.isfinite(score):
            raise ConfigError(f"{name}: the score of row {row!r} is {score}: let a training that diverged score worst.")
    if scored.steps != first.steps:
        raise ConfigError(f"{name} took {scored.steps} steps, {first_name} took {first.steps}: give each as many.")
    if set(scored.test) != set(first.test):
        raise ConfigError(f"{name} was tested on other rows than {first_name}: differences are of the same rows.")


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings in the folder, or check that they are those that it has."""
    file, own = folder / SETTINGS, json.loads(json.dumps(settings))
    if not file.exists():
        _write(file, own)
    elif _json(file) != own:
        raise ConfigError(f"{folder} holds trainings of the settings {_json(file)}, not {own}: choose another folder.")


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON ({error}): remove it to train anew.") from error


def _read(file: Path) -> Scored:
    row = _json(file)
    if not isinstance(row, dict) or not {"validation", "test", "steps"} <= row.keys():
        raise ConfigError(f"{file} is not a finished training: remove it to train anew.")
    return Scored(row["validation"], row["test"], row["steps"])


def _write(file: Path, value: Any) -> None:
    """Write a file whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)
