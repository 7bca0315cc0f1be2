"""`moa prune`: a smaller base to train on."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_out, check_out, say_dry


def add(command: Command) -> None:
    """Add `moa prune` to a parser; `command` makes a sub-parser."""
    prune = command("prune", _prune, "write a base with fewer attention heads and feed-forward channels")
    prune.add_argument("base", help="folder or hub id of the full base")
    prune.add_argument("out", help="folder for the pruned base")
    prune.add_argument("--ratio", type=float, required=True, help="share of heads and of channels that goes, e.g. 0.5")
    prune.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="blocks that are pruned, -1 the last; default: all but the first 4 and the last 2",
    )
    add_out(prune)


def _prune(arguments: argparse.Namespace) -> None:
    """Write a base without the heads and channels whose weights are smallest, for `moa train` to train a mixture on.

    `moa recover` takes the mixture to the full base. The folder is one that only moa reads.
    """
    from ..runs.pruned_folder import prune_folder

    check_out(arguments.out, arguments.overwrite, arguments.base)
    said = prune_folder(
        arguments.base,
        arguments.out,
        arguments.ratio,
        arguments.layers,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
    )
    if arguments.dry_run:
        say_dry(said, arguments.out)
    else:
        say(said, arguments.out)
