"""`moa recover`: a mixture trained on a pruned base, on the full one."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_import, add_out, check_out, say_dry


def add(command: Command) -> None:
    """Add `moa recover` to a parser; `command` makes a sub-parser."""
    recover = command("recover", _recover, "take a mixture that was trained on a pruned base to the full base")
    recover.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    recover.add_argument("out", help="folder for the checkpoint on the full base")
    recover.add_argument("--base", required=True, metavar="FULL", help="folder or hub id of the full base")
    recover.add_argument("--fill", default="zero", help="what removed inputs of A get: zero (default) or normal")
    recover.add_argument("--seed", type=int, default=0, help="of --fill normal (0)")
    add_out(recover)
    add_import(recover)


def _recover(arguments: argparse.Namespace) -> None:
    """Scatter a mixture's rows and columns to where the pruned base had them from, and save it on the full base.

    The result is a checkpoint like any other. The pruned base is not needed; the full one is compared with what the
    checkpoint says of it.
    """
    from ..formats.atomic import staged
    from ..formats.checkpoint import of_run
    from ..model.load import base_from
    from ..training.recovery import recover

    check_out(arguments.out, arguments.overwrite, arguments.checkpoint, arguments.base)
    source = of_run(arguments.checkpoint)
    full = base_from(source, arguments.base)
    model = recover(source, full, fill=arguments.fill, seed=arguments.seed)
    if arguments.dry_run:
        say_dry(f"recovers {len(model.mixtures())} layers on {type(model.base).__name__}", arguments.out)
        return
    with staged(arguments.out, overwrite=arguments.overwrite, inputs=[source]) as partial:
        model.save_pretrained(partial)
    say(arguments.out)
