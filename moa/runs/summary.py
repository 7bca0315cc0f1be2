"""What a run did, as text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import plain_text, shown
from .metrics import ERROR, Z, wilson
from .run_folder import FIGURE, MODEL, RESULTS


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: of the run: config.yaml, results.json, routing.png, routing.jsonl, TensorBoard events under runs/, the
            trained mixture and its tokenizer under model/, Trainer's own checkpoints.
        results: what results.json holds.
        routing: a text table, a line per layer.
    """

    folder: Path
    results: dict[str, Any]
    routing: str


# measure -> its title, and whether a mean over tasks says something: errors are in units of their own
TITLES = {
    "accuracy": ("accuracy", True),
    "rmse": ("RMSE", False),
    "mae": ("MAE", False),
    "pearson": ("Pearson r", True),
    "spearman": ("Spearman r", True),
    "loss": ("evaluation loss", True),
}


def score_table(results: Mapping[str, Any]) -> str:
    """Return the scores of a run as text: a line per task, every measure of every model that was scored.

    Beside each is half the width of its 95 % interval: what other rows of the same kind would change. That of an
    accuracy is Wilson's, others are 1.96 standard errors.

    Args:
        results: what `RunResult.results` or results.json holds.
    """
    parts = [_measure_table(results, measure) for measure in TITLES]
    bars = "±: half the width of the 95 % interval over the evaluation rows (of an accuracy the Wilson interval)"
    return "\n\n".join([*filter(None, parts), bars])


def _measure_table(results: Mapping[str, Any], measure: str) -> str:
    """Return the lines of one measure, "" where no task has it."""
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = results["scores"]
    tasks: Mapping[str, Mapping[str, Any]] = results["tasks"]
    models = [name for name in ("before", "frozen base", "LoRA", "mixture") if name in scores]
    measured = [task for task in tasks if any(measure in scores[model][task] for model in models)]
    if not measured:
        return ""
    title, comparable = TITLES[measure]
    cells: dict[str, list[tuple[float, float | None] | None]] = {}
    plain = {task: _untrained(tasks[task], measure) for task in measured}
    if any(value is not None for value in plain.values()):
        name = "majority" if measure == "accuracy" else "constant"
        cells[name] = [None if v is None else (v, _half(measure, v, {}, tasks[t])) for t, v in plain.items()]
    for model in models:
        rows = [scores[model][task] for task in measured]
        cells[model] = [
            (row[measure], _half(measure, row[measure], row, tasks[task])) if measure in row else None
            for task, row in zip(measured, rows, strict=True)
        ]
    kinds = {"regression" if tasks[task].get("kind") == "regression" else "other" for task in measured}
    if comparable and len(kinds) == 1:
        for column in cells.values():
            column.append(_mean(column))
    names = [title, *(shown(task, 40) for task in measured), *(["mean"] if comparable and len(kinds) == 1 else [])]
    counts = ["rows", *(str(tasks[task]["evaluation_rows"]) for task in measured), ""]
    columns = [_aligned(names, left=True), _aligned(counts[: len(names)])]
    columns += [_aligned([name, *map(_shown, column)]) for name, column in cells.items()]
    return "\n".join("  ".join(line) for line in zip(*columns, strict=True))


def _untrained(task: Mapping[str, Any], measure: str) -> float | None:
    """Return what always giving the same answer scores, where that is known."""
    if measure == "accuracy":
        return task["majority"]
    value: float | None = (task.get("constant") or {}).get(measure)
    return value


def _half(measure: str, value: float, row: Mapping[str, float], task: Mapping[str, Any]) -> float | None:
    """Return half the width of a score's 95 % interval, None where it is not known."""
    if measure == "accuracy":
        low, high = wilson(value, task["evaluation_rows"])
        return (high - low) / 2
    error = row.get(measure + ERROR)
    return None if error is None else Z * error


def _mean(column: Sequence[tuple[float, float | None] | None]) -> tuple[float, float | None] | None:
    """Return the mean of tasks' scores, whose rows are not the same, so that their errors add up in squares."""
    known = [cell for cell in column if cell is not None]
    if len(known) < len(column):
        return None
    halves = [half for _, half in known if half is not None]
    bar = math.hypot(*halves) / len(known) if len(halves) == len(known) else None
    return sum(value for value, _ in known) / len(known), bar


def _shown(cell: tuple[float, float | None] | None) -> str:
    if cell is None:
        return "—"
    value, half = cell
    return f"{value:.3f}" if half is None else f"{value:.3f} ±{half:.3f}"


def _aligned(cells: Sequence[str], left: bool = False) -> list[str]:
    width = max(map(len, cells))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in cells]


def summary(result: RunResult) -> str:
    """Return what a run did, as text for the terminal: scores, what they compare, routing, answers, next commands."""
    results, folder = result.results, Path(plain_text(result.folder))
    parameters = results["parameters"]
    recipe = results["recipe"]
    chosen_of = f", k = {recipe['k']}" if "k" in recipe else ""
    parts = [
        f"{recipe['router']}, {recipe['n_experts']} experts{chosen_of}: {parameters['active']:,} of "
        f"{parameters['experts']:,} expert parameters act on a row, {parameters['routers']:,} are in routers.",
        score_table(results),
    ]
    for name, about in results.get("compare", {}).items():
        picked = [f"{row['value']:g} ({row.get('accuracy', row['loss']):.3f})" for row in about.get("tried", [])]
        chosen = about.get("learning_rate", about.get("l2"))
        how = f"; {'learning rate' if 'learning_rate' in about else 'l2'} {chosen:g}" if chosen is not None else ""
        how += f", picked on held-out training rows from {', '.join(picked)}" if picked else ""
        size = f" ({about['parameters']:,} parameters)" if "parameters" in about else ""
        parts.append(f"{name}: {about['what']}{size}{how}.")
    parts.append(result.routing)
    for row in results.get("answers", []):
        parts.append(
            f"[{shown(row['task'], 40)}] {row['prompt']!r}\n  wanted {row['answer']!r}, written {row['generated']!r}"
        )
    parts.append(f"{results['seconds']['training']:.0f} s of training, {results['seconds']['total']:.0f} s in all.")
    parts.append(f"checkpoint {folder / MODEL}, figure {folder / FIGURE}, scores {folder / RESULTS}. Next:")
    commands = (f"moa report {folder}", f"moa inspect {folder / MODEL}", f"tensorboard --logdir {folder}")
    return "\n\n".join(parts) + "\n" + "\n".join(f"  {command}" for command in commands)
