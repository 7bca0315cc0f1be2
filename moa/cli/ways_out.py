"""`moa fold`, `moa distill`, `moa export`: what a saved mixture becomes when training is over."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

Command = Callable[..., argparse.ArgumentParser]


def add_fold(command: Command) -> None:
    """Add `moa fold` to a parser; `command` makes a sub-parser."""
    fold = command("fold", _fold, "fold a static mixture into its base and save the base")
    fold.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    fold.add_argument("out", help="folder for the folded model")
    fold.add_argument("--task", type=int, metavar="ID", help="fold what this task's inputs get")
    fold.add_argument("--shard-size", default="5GB", help="above which a new file begins (5GB)")
    _add_common(fold)


def add_export(command: Command) -> None:
    """Add `moa export` to a parser; `command` makes a sub-parser."""
    export = command("export", _export, "write experts as PEFT LoRA folders")
    export.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    export.add_argument("out", help="folder; each expert goes into OUT/expert_N")
    export.add_argument("--expert", type=int, help="only this one")
    _add_common(export)


def add_distill(command: Command) -> None:
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
    distill.add_argument("--task", type=int, metavar="ID", help="stand for this task's inputs alone")
    _add_common(distill)


def _add_common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    sub.add_argument("--dry-run", action="store_true", help="check, print what would be done, write nothing")


def _fold(arguments: argparse.Namespace) -> None:
    """Fold every mixture of a checkpoint into its base weight and save the base as a plain model.

    Exact, or an error that says why not: a routing that depends on the input has no one weight. The base's other files
    (tokenizer, licence) go along; transformers loads the result without moa.
    """
    from ..folding.save import check_folds, save_folded

    model = _load(arguments.checkpoint)
    if arguments.dry_run:
        check_folds(model, arguments.task)
        _check_target(arguments.out, arguments.overwrite, arguments.checkpoint)
        _say_dry(f"folds {len(model.mixtures())} layers into {type(model.base).__name__}", arguments.out)
        return
    out = save_folded(
        model,
        arguments.out,
        task_id=arguments.task,
        max_shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
    )
    print(out)


def _export(arguments: argparse.Namespace) -> None:
    """Write experts as PEFT LoRA folders that peft loads alone."""
    from ..formats.atomic import staged
    from ..formats.peft_export import export_expert

    model = _load(arguments.checkpoint)
    number = max(branch.bank.n_experts for _, branch in model.branches())
    experts = range(number) if arguments.expert is None else [arguments.expert]
    folders = [Path(arguments.out) / f"expert_{expert}" for expert in experts]
    for folder in folders:
        _check_target(folder, arguments.overwrite, arguments.checkpoint)
    if arguments.dry_run:
        _say_dry(f"writes {len(folders)} experts of {number}", ", ".join(map(str, folders)))
        return
    for expert, folder in zip(experts, folders, strict=True):
        with staged(folder, overwrite=arguments.overwrite) as partial:
            export_expert(model, expert, partial)
        print(folder)


def _distill(arguments: argparse.Namespace) -> None:
    """Make one LoRA of a mixture: closed form from its average routing, then gradient steps on its own outputs.

    The loss of the mixture, of the closed form and of the refined LoRA are printed, over the same training rows.
    Exact where routings are constant; those need no tasks.
    """
    from ..formats.atomic import staged
    from ..formats.peft_export import export_expert
    from ..training.distill import distill

    _check_target(arguments.out, arguments.overwrite, arguments.checkpoint)
    model = _load(arguments.checkpoint)
    batches = _batches(model, arguments)
    if arguments.dry_run:
        rows = sum(len(batch["input_ids"]) for batch in batches or ())
        data = f"{rows} rows in {len(batches)} batches" if batches else "no data"
        steps = f"; {arguments.steps} steps" if arguments.steps else ""
        _say_dry(f"one LoRA of rank {arguments.rank} on {len(model.mixtures())} layers; {data}{steps}", arguments.out)
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
    print(done.summary())
    with staged(arguments.out, overwrite=arguments.overwrite) as partial:
        export_expert(done.model, 0, partial)
    print(arguments.out)


def _load(path: str) -> MoAModel:
    from ..formats.checkpoint import of_run
    from ..model.build import load

    return load(of_run(path))


def _check_target(out: str | Path, overwrite: bool, checkpoint: str) -> None:
    from ..formats.atomic import check_target

    check_target(out, overwrite=overwrite, inputs=[checkpoint])


def _say_dry(what: str, out: str) -> None:
    print(f"{what}\nwrites {out}\ndry run: nothing was written")


def _batches(model: MoAModel, arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Return batches of the tasks' training rows; None where there is no configuration."""
    from ..errors import ConfigError
    from ..runs.config import read_config
    from ..runs.session import load_tokenizer, with_heads_of
    from ..runs.tasks import Collator, encode_tasks

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
    for task in encode_tasks(config.tasks, tokenizer, config.max_length, config.seed):
        rows = [task.train[i] for i in range(min(arguments.rows, len(task.train)))]
        size = arguments.batch_size
        batches += [collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    return batches
