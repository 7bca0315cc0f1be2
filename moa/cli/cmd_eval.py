"""`moa eval`: a checkpoint's scores."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_import, add_set


def add(command: Command) -> None:
    """Add the command to a parser."""
    evaluate = command("eval", _eval, "score a checkpoint on the tasks of a configuration")
    evaluate.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    evaluate.add_argument("--config", help="YAML file with the tasks; default: config.yaml of the run")
    add_set(evaluate)
    add_import(evaluate)


def _eval(arguments: argparse.Namespace) -> None:
    """Score a checkpoint on the tasks of a configuration: its measures on each, with error bars."""
    from ..runs.preflight import check_scored

    check_scored(arguments.checkpoint, arguments.config, arguments.overrides)
    from ..runs.progress import one_bar
    from ..runs.summary import score_table
    from ..runs.train import evaluate

    one_bar()
    say(*score_table(evaluate(arguments.checkpoint, arguments.config, arguments.overrides)).splitlines())
