"""The rows in numbers: mean and standard deviation over seeds, paired differences, a table and a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapters import KINDS
from .merges import merges_of

Row = Mapping[str, Any]
REFERENCE = "lora_r8"
COLOURS = dict(zip(KINDS, ("#888888", "#444444", "#e69f00", "#0072b2", "#56b4e9"), strict=True))


def spread(values: Iterable[float]) -> dict[str, float | int | None]:
    """Return mean, standard deviation over seeds (n - 1) and number of values."""
    known = list(values)
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.mean(known), "std": std, "n": len(known)}


def mean_of(scores: Mapping[str, float]) -> float:
    """Return the mean accuracy over tasks."""
    return statistics.mean(scores.values())


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Return, for each kind: accuracy before and after each merge, per task and mean, and the loss, also over LoRA r8.

    The loss of a merge is the mean accuracy over tasks before minus after, of one seed. Its difference to LoRA r8's is
    taken seed by seed: the rows are the same.
    """
    runs = {(row["kind"], row["seed"]): row for row in rows if row["phase"] == "compare"}
    out: dict[str, Any] = {"head_alone": _scores([row["head_alone"] for row in rows if row["phase"] == "probe"])}
    for kind in KINDS:
        own = {seed: row for (k, seed), row in runs.items() if k == kind}
        if not own:
            continue
        out[kind] = {"before": _scores([row["before"] for row in own.values()]), "merges": {}}
        if all("before_dense" in row for row in own.values()):
            out[kind]["before_without_top_k"] = _scores([row["before_dense"] for row in own.values()])
        for merge in merges_of(kind):
            lost = {seed: mean_of(row["before"]) - mean_of(row["after"][merge]) for seed, row in own.items()}
            against = merge.removesuffix("_own_top_k")
            reference = {
                seed: mean_of(row["before"]) - mean_of(row["after"][against])
                for (k, seed), row in runs.items()
                if k == REFERENCE
            }
            both = [lost[seed] - reference[seed] for seed in lost if seed in reference]
            out[kind]["merges"][merge] = {
                "after": _scores([row["after"][merge] for row in own.values()]),
                "loss": spread(lost.values()),
                "loss_minus_lora_r8s": spread(both) if both and kind != REFERENCE else None,
            }
    return out


def _scores(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    tasks = {task: spread(own[task] for own in scores) for task in scores[0]} if scores else {}
    return {"mean": spread(map(mean_of, scores)), "tasks": tasks} if scores else {}


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as lines of text: accuracies in per cent, mean ± standard deviation over seeds."""
    head = summary["head_alone"]
    lines = [f"head on the frozen base: {_cell(head['mean'])}"] if head else []
    lines.append(f"{'kind':<20} {'merge':<28} {'before':>12} {'after':>12} {'loss':>12} {'loss - LoRA r8 loss':>20}")
    for kind, own in summary.items():
        for merge, values in own.get("merges", {}).items():
            cells = (own["before"]["mean"], values["after"]["mean"], values["loss"], values["loss_minus_lora_r8s"])
            text = [_cell(cell) for cell in cells]
            lines.append(f"{kind:<20} {merge:<28} {text[0]:>12} {text[1]:>12} {text[2]:>12} {text[3]:>20}")
    return "\n".join(lines)


def _cell(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{100 * value['mean']:.1f}" + (f" ± {100 * value['std']:.1f}" if value["std"] is not None else "")


def figure(summary: Mapping[str, Any], path: Path) -> Path:
    """Draw accuracy before and after each merge, one bar per kind with its standard deviation, and return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if kind in summary]
    merges = merges_of("flylora_shared")
    drawn = Figure(figsize=(10, 3.6), dpi=90, layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.add_subplot()
    width = 0.8 / max(len(kinds), 1)
    for number, kind in enumerate(kinds):
        own = summary[kind]
        cells = [
            own["before"]["mean"],
            *(own["merges"].get(merge, {}).get("after", {}).get("mean") for merge in merges),
        ]
        for place, cell in enumerate(cells):
            if cell is not None:
                at = place + (number - (len(kinds) - 1) / 2) * width
                axes.bar(
                    at,
                    100 * cell["mean"],
                    width,
                    yerr=None if cell["std"] is None else 100 * cell["std"],
                    color=COLOURS[kind],
                    label=kind.replace("_", " ") if place == 0 else None,
                    error_kw={"lw": 1, "capsize": 2},
                )
    if summary["head_alone"]:
        axes.axhline(100 * summary["head_alone"]["mean"]["mean"], color="black", lw=1, ls="--", label="head alone")
    axes.set_xticks(
        range(len(merges) + 1), ["own adapter", *(m.replace("_", " ").replace(" own", "\nown") for m in merges)]
    )
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("accuracy, mean of tasks, %")
    axes.set_ylim(bottom=45)
    axes.legend(ncols=3, fontsize=8, loc="lower left")
    axes.set_title("One adapter per task, then merged: mean and standard deviation over seeds", fontsize=10)
    drawn.savefig(path)
    return path
