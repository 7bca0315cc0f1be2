"""`moa distill`: one LoRA of a routed mixture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.processes import say
from .shared_options import Command, add_import, add_out, check_out, check_task, load_checkpoint, say_dry

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel


def add(command: Command) -> None:
    """Add `moa distill` to a parser; `command` makes a sub-parser."""
    distill = command("distill", _distill, "make one LoRA of a routed mixture, and print what that costs")
    distill.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    distill.add_argument("out", help="PEFT LoRA folder to write")
    distill.add_argument("--rank", type=int, required=True, help="of the LoRA")
    distill.add_argument("--config", help="YAML file with the tasks; default: config.yaml of the run, if it has one")
    distill.add_argument("--rows", type=int, default=256, help="training rows per task to look at (256)")
    distill.add_argument("--batch-size", type=int, default=8, help="rows per batch (8)")
    distill.add_argument("--steps", type=int, default=0, help="gradient steps after the closed form (0)")
    distill.add_argument("--lr", type=float, default=1e-3, help="learning rate of the first step (1e-3)")
    distill.add_argument("--objective", default="kl", help="what the steps lower: kl (default) or mse of the logits")
    distill.add_argument("--task", type=int, metavar="ID", help="stand for only this task's inputs")
    add_out(distill)
    add_import(distill)


def _distill(arguments: argparse.Namespace) -> None:
    """Make one LoRA of a mixture: closed form from its average routing, then gradient steps on its own outputs.

    The loss of the mixture, of the closed form and of the refined LoRA are printed, over the same training rows.
    Exact where routings are constant; those need no tasks.
    """
    from ..formats.peft_export import export_expert
    from ..training.distill import distill

    check_out(arguments.out, arguments.overwrite, arguments.checkpoint)
    model = load_checkpoint(arguments.checkpoint)
    check_task(model, arguments.task)
    batches = _batches(model, arguments)
    if arguments.dry_run:
        rows = sum(len(batch["input_ids"]) for batch in batches or ())
        data = f"{rows} rows in {len(batches)} batches" if batches else "no data"
        steps = f"; {arguments.steps} steps" if arguments.steps else ""
        say_dry(f"one LoRA of rank {arguments.rank} on {len(model.mixtures())} layers; {data}{steps}", arguments.out)
        return
    done = distill(
        model,
        arguments.rank,
        batches,
        task_id=arguments.task,
        steps=arguments.steps,
        lr=arguments.lr,
        objective=arguments.objective,
        progress=True,
    )
    say(*done.summary().splitlines())
    export_expert(done.model, 0, arguments.out, overwrite=arguments.overwrite)
    say(arguments.out)


def _batches(model: MoAModel, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return batches of the tasks' training rows; None where there is no configuration."""
    from ..errors import ConfigError
    from ..runs.collate import Collator
    from ..runs.config import read_config
    from ..runs.encode import encode_tasks
    from ..runs.run_model import load_tokenizer, with_heads_of

    folder = Path(arguments.checkpoint)
    own = next((f for f in (folder / "config.yaml", folder.parent / "config.yaml") if f.is_file()), None)
    source = arguments.config or own
    if source is None:
        return None
    if arguments.rows < 1 or arguments.batch_size < 1:
        raise ConfigError(f"--rows {arguments.rows} and --batch-size {arguments.batch_size} must be at least 1.")
    config = with_heads_of(read_config(source), model, folder)
    tokenizer = load_tokenizer(config.base)
    collate = Collator(tokenizer)
    batches = []
    for task in encode_tasks(config.tasks, tokenizer, config.max_length, config.seed, config.long_rows):
        rows = [task.train[i] for i in range(min(arguments.rows, len(task.train)))]
        size = arguments.batch_size
        batches += [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    return batches
