"""`moa report`: a run as a page."""

from __future__ import annotations

import argparse

from ..errors import ConfigError
from ..runs.processes import say
from .shared_options import Command, add_import


def add(command: Command) -> None:
    """Add the command to a parser."""
    page = command("report", _report, "write a page with a run's routing figures")
    page.add_argument("run_dir", help="folder of a run")
    page.add_argument("--spectra", action="store_true", help="load its checkpoint: ranks and overlap of its experts")
    page.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="with --spectra: read N evaluation rows a task, for attention outputs",
    )
    add_import(page)


def _report(arguments: argparse.Namespace) -> None:
    """Write RUN_DIR/report.html: loads, entropy, losses and collapse warnings of a run, in one file.

    --spectra adds how many directions each expert uses, and how far experts share them; --rows N what takes rows: the
    spectra of attention outputs, and how far tasks pull the experts together."""
    from ..monitor.report import report

    folder, n = arguments.run_dir, arguments.rows
    if n is None:
        say(str(report(folder, arguments.spectra)))
        return
    if not arguments.spectra:
        raise ConfigError(f"--rows {n} is for the spectra: pass --spectra, too.")
    if n < 1:
        raise ConfigError(f"--rows must be at least 1, got {n}.")
    from ..runs.first_rows import first_rows

    say(str(report(folder, True, lambda model: first_rows(folder, model, n))))
