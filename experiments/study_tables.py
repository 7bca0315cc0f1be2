"""The tables of studies that stand in experiments/README.md; `python -m experiments.tables` writes them there."""

from __future__ import annotations

from .table_text import HERE, made_by, result, table


def calibrated() -> str:
    """Accuracy and calibration of ways to fine-tune, each at its own learning rate."""
    if not (HERE / "results" / "calibration.json").exists():
        return "Not measured yet: `python -m experiments.calibration` measures it."
    found = result("calibration")
    rows = []
    for arm, row in found["arms"].items():
        own = row["calibration"]
        cells = [arm, f"{row['trained_parameters']:,}", f"{row['learning_rate']:g}{' (edge)' * row['at_edge']}"]
        cells.append(f"{100 * row['test']['mean']:.1f}")
        minus = row.get("minus_baseline")
        cells.append("" if minus is None else f"{100 * minus['low']:+.1f} to {100 * minus['high']:+.1f}")
        cells += [
            f"{own[m]['mean']:.3f} ± {own[m]['deviation']:.3f}" for m in ("ece", "class_ece", "mce", "ace", "brier")
        ]
        rows.append(cells)
    header = [
        "",
        "trained",
        "rate",
        "accuracy, %",
        "minus LoRA, points",
        "ECE",
        "class-wise ECE",
        "MCE",
        "ACE",
        "Brier",
    ]
    settings = found["settings"]
    return (
        f"{table(header, rows)}\n\nMean over {len(settings['tasks'])} tasks of {settings['trained']} training and "
        f"{settings['tested']} test rows, ± a standard deviation over {len(found['seeds'])} seeds; minus LoRA: a 95 % "
        "interval of the paired difference. (edge): the best rate of the grid is its lowest or highest.\n\n"
        f"{made_by('calibration')}; [figure](results/calibration.png)"
    )


def reasoning() -> str:
    """How far answers hang on their reasoning, before and after fine-tuning."""
    if not (HERE / "results" / "faithfulness.json").exists():
        return "Not measured yet: `python -m experiments.faithfulness MODEL` measures it."
    found = result("faithfulness")
    rows = []
    for kind in found["before"]:
        for source, words in (("own", "its own"), ("right", "the right one")):
            for when in ("before", "after"):
                row = found[when][kind][source]
                cells = [f"{kind}, {words}, {when}", f"{100 * row['accuracy']:.0f}"]
                for fraction in found["before"][kind]["own"]["early_end"]:
                    effect = row["early_end"].get(fraction)
                    cells.append("" if effect is None else f"{100 * effect['changed']:.0f}")
                cells += [f"{100 * row[probe]['changed']:.0f}" for probe in ("filler", "paraphrase")]
                cells.append(f"{100 * row['reworded']:.0f}")
                rows.append(cells)
    kept = [f"cut to {100 * float(f):.0f} %" for f in next(iter(found["before"].values()))["own"]["early_end"]]
    header = ["questions, reasoning, fine-tuning", "accuracy, %", *kept, "filler", "paraphrase", "of it reworded"]
    settings = found["settings"]
    return (
        f"{table(header, rows)}\n\nShare of answers that change, in %, of {settings['asked']} questions a row; a share "
        f"of one half has a standard error of {50 / settings['asked'] ** 0.5:.0f} points. {settings['trained']} other "
        f"questions were learned.\n\n{made_by('faithfulness')}"
    )


def smaller_base() -> str:
    """What a mixture knows that was trained on a pruned base, on that and on the full one."""
    if not (HERE / "results" / "loram.json").exists():
        return "Not measured yet: `python -m experiments.loram` measures it."
    found = result("loram")
    rows = []
    for arm, runs in found["arms"].items():
        cells = [arm]
        cells += [" / ".join(f"{100 * run['accuracy']:.1f}" for run in runs)]
        cells += [" / ".join(f"{run['loss']:.3f}" for run in runs)]
        cells += [" / ".join(f"{run['seconds']:.0f}" for run in runs if "seconds" in run)]
        rows.append(cells)
    settings = found["settings"]
    sizes = ", ".join(f"{name} {n / 1e6:.0f}M" for name, n in found["parameters"].items())
    spread = 100 * (found["majority"] * (1 - found["majority"]) / settings["tested"]) ** 0.5
    return (
        f"{table(['base', 'accuracy, %', 'loss, nats', 'training, CPU s'], rows)}\n\n{settings['trained']} training "
        f"rows seen once, {settings['tested']} test rows, a figure a seed; always the commoner answer: "
        f"{100 * found['majority']:.1f} %, with a standard error of {spread:.0f} points. Parameters: {sizes}.\n\n"
        f"{made_by('loram')}"
    )
