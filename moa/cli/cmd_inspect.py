"""`moa inspect`: what is in a checkpoint."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_import


def add(command: Command) -> None:
    """Add the command to a parser."""
    look = command("inspect", _inspect, "print what is in a checkpoint, and which engine would run each layer")
    look.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    look.add_argument("--tokens", type=int, default=1024, help="rows per forward the engine is chosen for (1024)")
    look.add_argument("--dtype", default="float32", help="of the activations (float32)")
    look.add_argument("--device", default="cpu", help="where it would run (cpu)")
    add_import(look)


def _inspect(arguments: argparse.Namespace) -> None:
    """Print what is in a checkpoint: format, base, recipes, layers with their sizes, and the engine for each."""
    from ..formats.checkpoint import of_run
    from .inspection import describe_checkpoint

    folder = of_run(arguments.checkpoint)
    say(*describe_checkpoint(folder, arguments.tokens, arguments.dtype, arguments.device).splitlines())
