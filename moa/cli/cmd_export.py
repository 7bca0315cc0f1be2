"""`moa export`: experts or tasks as PEFT LoRA folders, or the whole model as a folder that vLLM runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.processes import say
from .shared_options import Command, add_import, add_out, check_out, load_checkpoint, say_dry

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

Write = Callable[..., Any]


def add(command: Command) -> None:
    """Add `moa export` to a parser; `command` makes a sub-parser."""
    export = command("export", _export, "write experts as PEFT LoRA folders, or a folder that vLLM runs")
    export.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    export.add_argument("out", help="folder; each expert goes into OUT/expert_N, each task into OUT/task_N")
    export.add_argument(
        "--to",
        choices=("peft", "peft-tasks", "vllm"),
        default="peft",
        help="peft: one LoRA for each expert; peft-tasks: one for each task that routers look at; vllm: base and "
        "mixtures as one model",
    )
    export.add_argument("--expert", type=int, help="only this one, with --to peft")
    add_out(export)
    add_import(export)


def _export(arguments: argparse.Namespace) -> None:
    """Write experts as PEFT LoRA folders that peft loads alone, one LoRA for each task, or a folder that vLLM runs."""
    from ..errors import ConfigError

    if arguments.expert is not None and arguments.to != "peft":
        raise ConfigError(
            f"--expert {arguments.expert} is for --to peft; --to {arguments.to} has no experts to choose."
        )
    model = load_checkpoint(arguments.checkpoint)
    written = _folders(model, arguments)
    for folder in written:
        check_out(folder, arguments.overwrite, arguments.checkpoint)
    if arguments.dry_run:
        say_dry(_said(model, arguments, len(written)), ", ".join(map(str, written)))
        return
    for folder, write in written.items():
        write(folder, overwrite=arguments.overwrite)
        say(str(folder))


def _said(model: MoAModel, arguments: argparse.Namespace, number: int) -> str:
    if arguments.to == "vllm":
        return "writes base and mixtures as one model for vLLM"
    return f"writes {number} tasks" if arguments.to == "peft-tasks" else f"writes {number} experts of {_experts(model)}"


def _experts(model: MoAModel) -> int:
    return max(branch.router.n_experts for _, branch in model.branches())


def _folders(model: MoAModel, arguments: argparse.Namespace) -> dict[Path, Write]:
    """Return what is written into which folder."""
    from ..formats.peft_export import export_expert, export_task, tasks_of
    from ..serving.servable import check_servable
    from ..serving.vllm.vllm_folder import export_vllm

    out = Path(arguments.out)
    if arguments.to == "vllm":
        check_servable(model)
        return {out: partial(export_vllm, model)}
    if arguments.to == "peft-tasks":
        return {out / f"task_{task}": partial(export_task, model, task) for task in tasks_of(model)}
    experts = range(_experts(model)) if arguments.expert is None else [arguments.expert]
    return {out / f"expert_{expert}": partial(export_expert, model, expert) for expert in experts}
