"""`moa eval`: a checkpoint's scores."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..runs.processes import is_first, say
from .shared_options import Command, add_import, add_set


def add(command: Command) -> None:
    """Add the command to a parser."""
    evaluate = command("eval", _eval, "score a checkpoint on the tasks of a configuration")
    evaluate.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    evaluate.add_argument("--config", help="YAML file with the tasks; default: config.yaml of the run")
    evaluate.add_argument("--calibration", action="store_true", help="measure how far probabilities can be believed")
    evaluate.add_argument("--figure", metavar="PATH", help="write the reliability diagram there (.png)")
    evaluate.add_argument("--json", metavar="PATH", help="write all of it there (.json), in the form of results.json")
    evaluate.add_argument("--overwrite", action="store_true", help="replace the files that are there")
    add_set(evaluate)
    add_import(evaluate)


def _eval(arguments: argparse.Namespace) -> None:
    """Score a checkpoint on the tasks of a configuration: its measures on each, with error bars.

    --calibration adds calibration errors and the Brier score with its parts, for tasks that classify.
    """
    from ..runs.applied import check_file
    from ..runs.preflight import check_scored

    calibrated, figure = arguments.calibration, arguments.figure
    if figure and not calibrated:
        raise ConfigError(f"--figure {figure} draws the calibration: pass --calibration, too.")
    for option, path in (("--figure", figure), ("--json", arguments.json)):
        if path:
            check_file(path, arguments.overwrite, option, (".png" if option == "--figure" else ".json",))
    check_scored(arguments.checkpoint, arguments.config, arguments.overrides)
    from ..runs.progress import one_bar
    from ..runs.summary import score_table
    from ..runs.train import evaluate

    one_bar()
    results = evaluate(arguments.checkpoint, arguments.config, arguments.overrides, calibrated)
    say(*score_table(results).splitlines())
    if calibrated:
        from ..runs.calibrated import calibration_table

        say("", *calibration_table(results["calibration"]).splitlines())
    if arguments.json:
        _write(arguments.json, lambda path: path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8"))
    if figure:
        from ..monitor.figures import reliability_figure

        drawn = reliability_figure({task: row["bins"] for task, row in results["calibration"].items()})
        _write(figure, lambda path: drawn.savefig(path, format="png", dpi=150))


def _write(out: str, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, in the first process, and say where."""
    from ..formats.atomic import replacing, said_of

    if not is_first():
        return
    target = Path(out).absolute()
    with said_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            write(Path(temporary))
    say(out)
