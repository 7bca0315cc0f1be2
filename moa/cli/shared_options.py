"""What several commands share: making a sub-parser, --set, checkpoints in and folders out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..runs.processes import say

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

Command = Callable[..., argparse.ArgumentParser]


def add_set(sub: argparse.ArgumentParser) -> None:
    """Add --set KEY=VALUE."""
    sub.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one key of the configuration, e.g. --set training.learning_rate=1e-3; may be repeated",
    )


def add_out(sub: argparse.ArgumentParser) -> None:
    """Add --overwrite and --dry-run."""
    sub.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    sub.add_argument("--dry-run", action="store_true", help="check, print what would be done, write nothing")


def add_import(sub: argparse.ArgumentParser) -> None:
    """Add --import MODULE; `main` imports it before the command runs."""
    sub.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module or .py file that registers a recipe, family or merging method of your own; may be repeated",
    )


def load_checkpoint(path: str) -> MoAModel:
    """Return the model of a checkpoint, or of a run.

    Raises:
        CheckpointError: none there.
    """
    from ..formats.checkpoint import of_run
    from ..model.build import load

    return load(of_run(path))


def check_task(model: MoAModel, task: int | None) -> None:
    """Check that --task is the id of a task that a model has.

    Raises:
        ConfigError: nothing in the model looks at a task, or it has none of this id.
    """
    if task is None:
        return
    routers: list[Any] = [branch.router for _, branch in model.branches() if hasattr(branch.router, "tasks")]
    known = [set(router.known_tasks) for router in routers if router.known_tasks is not None]
    labels = getattr(model.config, "labels", None)
    if labels:
        known.append(set(range(len(labels))))
    if not known and not routers:
        raise ConfigError(f"--task {task}: nothing in this checkpoint looks at a task; leave it out.")
    ids = sorted(set.intersection(*known)) if known else None
    if task < 0 or (ids is not None and task not in ids):
        span = "0 or more" if not ids else f"from {ids[0]} to {ids[-1]}"
        raise ConfigError(f"--task must be {span}, got {task}.")


def check_out(out: str | Path, overwrite: bool, *inputs: str) -> None:
    """Check that a folder may be written: see `moa.formats.atomic.check_target`."""
    from ..formats.atomic import check_target
    from ..runs.run_folder import check_writable

    check_writable(Path(out).absolute(), "the output")
    check_target(out, overwrite=overwrite, inputs=inputs)


def say_dry(what: str, out: str) -> None:
    """Print what a dry run would have done."""
    say(*what.splitlines(), f"writes {out}", "dry run: nothing was written")
