"""`moa report`: a run as a page."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_import


def add(command: Command) -> None:
    """Add the command to a parser."""
    page = command("report", _report, "write a page with a run's routing figures")
    page.add_argument("run_dir", help="folder of a run")
    page.add_argument("--spectra", action="store_true", help="load its checkpoint: ranks and overlap of its experts")
    add_import(page)


def _report(arguments: argparse.Namespace) -> None:
    """Write RUN_DIR/report.html: loads, entropy, losses and collapse warnings of a run, in one file.

    --spectra adds how many directions each expert uses, and how far experts share them."""
    from ..monitor.report import report

    say(str(report(arguments.run_dir, arguments.spectra)))
