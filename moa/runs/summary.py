"""What a run did, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .metrics import wilson
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


def score_table(results: Mapping[str, Any]) -> str:
    """Return the scores of a run as text: a line per task, accuracy and loss of every model that was scored.

    Beside each accuracy is half the width of its 95 % Wilson interval: what other rows of the same kind would change.

    Args:
        results: what `RunResult.results` or results.json holds.
    """
    scores: Mapping[str, Mapping[str, Mapping[str, float]]] = results["scores"]
    order = [name for name in ("before", "frozen base", "LoRA", "mixture") if name in scores]
    majority = {task: row["majority"] for task, row in results["tasks"].items() if row["majority"] is not None}
    columns = (["majority"] if majority else []) + order
    width = max(len("evaluation loss"), *(len(task) for task in results["tasks"]))
    lines = []
    for measure, title in (("accuracy", "accuracy"), ("loss", "evaluation loss")):
        shown = [column for column in columns if measure == "accuracy" or column != "majority"]
        cell = 12 if measure == "accuracy" else 11
        lines.append(f"{title:<{width}}  rows  " + "  ".join(f"{column:>{cell}}" for column in shown))
        table = {
            task: [majority[task] if c == "majority" else scores[c][task][measure] for c in shown]
            for task in results["tasks"]
        }
        for task, values in table.items():
            rows = results["tasks"][task]["evaluation_rows"]
            cells = [_with_bar(value, rows) if measure == "accuracy" else f"{value:11.3f}" for value in values]
            lines.append(f"{task:<{width}}  {rows:4}  " + "  ".join(cells))
        means = [sum(column) / len(table) for column in zip(*table.values(), strict=True)]
        bar = " " * 7 if measure == "accuracy" else ""
        lines.append(f"{'mean':<{width}}        " + "  ".join(f"{value:{cell - len(bar)}.3f}{bar}" for value in means))
        if measure == "accuracy":
            lines.append("±: half the width of the 95 % Wilson interval over the evaluation rows")
        lines.append("")
    return "\n".join(lines[:-1])


def _with_bar(share: float, rows: int) -> str:
    low, high = wilson(share, rows)
    return f"{share:.3f} ±{(high - low) / 2:.3f}"


def summary(result: RunResult) -> str:
    """Return what a run did, as text for the terminal: scores, what they compare, routing, answers, next commands."""
    results, folder = result.results, result.folder
    parameters = results["parameters"]
    recipe = results["recipe"]
    parts = [
        f"{recipe['router']}, {recipe['n_experts']} experts, k = {recipe['k']}: {parameters['active']:,} of "
        f"{parameters['experts']:,} expert parameters act on a row, {parameters['routers']:,} are in routers.",
        score_table(results),
    ]
    for name, about in results.get("compare", {}).items():
        picked = [f"{row['value']:g} ({row['accuracy']:.3f})" for row in about.get("tried", [])]
        chosen = about.get("learning_rate", about.get("l2"))
        how = f"; {'learning rate' if 'learning_rate' in about else 'l2'} {chosen:g}" if chosen is not None else ""
        how += f", picked on held-out training rows from {', '.join(picked)}" if picked else ""
        size = f" ({about['parameters']:,} parameters)" if "parameters" in about else ""
        parts.append(f"{name}: {about['what']}{size}{how}.")
    parts.append(result.routing)
    for row in results.get("answers", []):
        parts.append(f"[{row['task']}] {row['prompt']!r}\n  wanted {row['answer']!r}, written {row['generated']!r}")
    parts.append(f"{results['seconds']['training']:.0f} s of training, {results['seconds']['total']:.0f} s in all.")
    parts.append(f"checkpoint {folder / MODEL}, figure {folder / FIGURE}, scores {folder / RESULTS}. Next:")
    commands = (f"moa report {folder}", f"moa inspect {folder / MODEL}", f"tensorboard --logdir {folder}")
    return "\n\n".join(parts) + "\n" + "\n".join(f"  {command}" for command in commands)
