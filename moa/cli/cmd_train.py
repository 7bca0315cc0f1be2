"""`moa train`: a configuration into a run."""

from __future__ import annotations

import argparse
import inspect

from ..runs.processes import say
from .shared_options import Command, add_set


def add(command: Command, help_asked: bool) -> None:
    """Add the command to a parser; where its help is asked for, that lists every key of a configuration."""
    train = command("train", _train, "run a training configuration", _keys() if help_asked else "")
    train.add_argument("config", help="YAML file; moa init writes one to start from")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint-N of the run")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check what a run checks before it trains, and write nothing; a base on the hub is not fetched for it",
    )
    add_set(train)


def _train(arguments: argparse.Namespace) -> None:
    """Train the mixture that a YAML file describes, score it before and after, and write a run folder."""
    from ..runs.joint import joint

    with joint():
        _joint_run(arguments)


def _joint_run(arguments: argparse.Namespace) -> None:
    from ..runs.config import read_config
    from ..runs.preflight import check_run
    from ..runs.yaml_values import is_folder

    config = read_config(arguments.config, arguments.overrides, recipe=False)
    checked = check_run(config, arguments.resume)
    if arguments.dry_run:
        if is_folder(config.base):
            from ..runs.progress import one_bar
            from ..runs.train import prepare

            one_bar()
            prepare(checked)
        else:
            for rows in checked.rows:
                say(f"{rows.name}: {len(rows.train)} training rows, {len(rows.eval)} evaluation rows")
            for note in (note for rows in checked.rows for note in rows.notes):
                say(f"note: {note}")
            say(f"note: {config.base} is not a folder here, so base, tokens and model are checked when it is fetched.")
        say(f"writes {config.output}", "dry run: nothing was written")
        return
    from ..runs.progress import one_bar
    from ..runs.summary import summary
    from ..runs.train import train

    one_bar()
    say(*summary(train(config, arguments.resume, checked)).splitlines())


def _keys() -> str:
    """Return the documentation of every key of a configuration."""
    from ..runs.config import Compare, Generate, TrainConfig
    from ..runs.tasks import Task

    parts = []
    for title, cls in (
        ("configuration keys", TrainConfig),
        ("keys of each task (tasks.NAME.KEY)", Task),
        ("keys under compare", Compare),
        ("keys under generate", Generate),
    ):
        text = inspect.getdoc(cls) or ""
        parts.append(f"{title}:\n" + text.partition("Args:\n")[2].partition("\n\n")[0])
    return "\n\n".join(parts)
