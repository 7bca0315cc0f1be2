"""`moa fold`: a static mixture into its base."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_import, add_out, check_out, check_task, load_checkpoint, say_dry


def add(command: Command) -> None:
    """Add `moa fold` to a parser; `command` makes a sub-parser."""
    fold = command("fold", _fold, "fold a static mixture into its base and save the base")
    fold.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    fold.add_argument("out", help="folder for the folded model")
    fold.add_argument("--task", type=int, metavar="ID", help="fold what this task's inputs get")
    fold.add_argument("--shard-size", default="5GB", help="above which a new file begins (5GB)")
    add_out(fold)
    add_import(fold)


def _fold(arguments: argparse.Namespace) -> None:
    """Fold every mixture of a checkpoint into its base weight and save the base as a plain model.

    Exact, or an error that says why not: a routing that depends on the input has no one weight. The base's other files
    (tokenizer, licence) go along; transformers loads the result without moa.
    """
    from ..folding.save import check_folds, save_folded

    check_out(arguments.out, arguments.overwrite, arguments.checkpoint)
    model = load_checkpoint(arguments.checkpoint)
    check_task(model, arguments.task)
    if arguments.dry_run:
        check_folds(model, arguments.task)
        say_dry(f"folds {len(model.mixtures())} layers into {type(model.base).__name__}", arguments.out)
        return
    out = save_folded(
        model,
        arguments.out,
        task_id=arguments.task,
        max_shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
    )
    say(str(out))
