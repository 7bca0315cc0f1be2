"""`moa export`: experts as PEFT LoRA folders."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shared_options import Command, add_out, check_out, load_checkpoint, say_dry


def add(command: Command) -> None:
    """Add `moa export` to a parser; `command` makes a sub-parser."""
    export = command("export", _export, "write experts as PEFT LoRA folders")
    export.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    export.add_argument("out", help="folder; each expert goes into OUT/expert_N")
    export.add_argument("--expert", type=int, help="only this one")
    add_out(export)


def _export(arguments: argparse.Namespace) -> None:
    """Write experts as PEFT LoRA folders that peft loads alone."""
    from ..formats.peft_export import export_expert

    model = load_checkpoint(arguments.checkpoint)
    number = max(branch.router.n_experts for _, branch in model.branches())
    experts = range(number) if arguments.expert is None else [arguments.expert]
    folders = [Path(arguments.out) / f"expert_{expert}" for expert in experts]
    for folder in folders:
        check_out(folder, arguments.overwrite, arguments.checkpoint)
    if arguments.dry_run:
        say_dry(f"writes {len(folders)} experts of {number}", ", ".join(map(str, folders)))
        return
    for expert, folder in zip(experts, folders, strict=True):
        export_expert(model, expert, folder, overwrite=arguments.overwrite)
        print(folder)
