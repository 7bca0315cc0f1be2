"""`moa report`: a run as a page."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command


def add(command: Command) -> None:
    """Add the command to a parser."""
    page = command("report", _report, "write a page with a run's routing figures")
    page.add_argument("run_dir", help="folder of a run")


def _report(arguments: argparse.Namespace) -> None:
    """Write RUN_DIR/report.html: loads, entropy, losses and collapse warnings of a run, in one file."""
    from ..monitor.report import report

    say(str(report(arguments.run_dir)))
