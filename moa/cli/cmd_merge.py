"""`moa merge`: adapters or a YAML recipe in, an adapter or a whole checkpoint out."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs.processes import say
from .shared_options import add_import, check_out

if TYPE_CHECKING:
    from ..merge.jobs import Plan
    from .merge_config import MergeConfig

ENDINGS = (".yaml", ".yml")
STATISTICS = {"grams", "fishers"}  # options that only Python can give


def add(command: Callable[..., argparse.ArgumentParser], help_asked: bool) -> None:
    """Add the sub-command to a parser.

    Args:
        command: makes a sub-parser from a name, a function and a line of help.
        help_asked: list every method and key below the help, which imports torch.
    """
    merge = command("merge", _merge, "merge adapters of one base into one, offline", _lists() if help_asked else "")
    merge.add_argument("adapters", nargs="+", help="PEFT LoRA folders, or one YAML file with the keys below")
    merge.add_argument("--out", help="folder to write")
    merge.add_argument("--method", help="see below (ties)")
    merge.add_argument("--weights", nargs="+", type=float, help="one number per adapter")
    merge.add_argument("--base", help="folder of the base: write base plus merged change, not an adapter")
    merge.add_argument(
        "--rank",
        type=int,
        help="squeeze the merged change to this rank (where that is needed, the sum of the adapters' ranks)",
    )
    merge.add_argument("--missing", help="refuse (default) or zero: what to do where adapters hold other layers")
    merge.add_argument("--overwrite", action="store_true", default=None, help="replace what OUT holds")
    merge.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be done, write nothing"
    )
    merge.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="one option of the method, e.g. --set density=0.2; may be repeated",
    )
    add_import(merge)


def _merge(arguments: argparse.Namespace) -> None:
    """Merge adapters of one base by a named method; write an adapter, or with --base a whole checkpoint.

    The adapters are PEFT LoRA folders, or with --base also whole fine-tuned checkpoints of it. What squeezing to
    --rank loses is printed.

      moa merge expert_0 expert_1 --method ties --set density=0.2 --rank 16 --out merged
      moa merge recipe.yaml --dry-run
    """
    from ..merge import merge_lazily, write_checkpoint, write_peft

    config = _config(arguments)
    adapters = config.read()
    plan = _checked(config, adapters)
    config = dataclasses.replace(config, rank=_rank(config, plan))
    merged = merge_lazily(
        adapters,
        config.weights,
        config.method,
        missing=config.missing,
        same_base=config.same_base,
        **config.options,
    )
    merged[plan.names[0]]  # what a method says of its weights and options, it says at the first layer
    if arguments.dry_run:
        say(*_said(config, plan))
        return
    for note in _notes(config, plan):
        say(f"note: {note}")
    if config.base is not None:
        written = write_checkpoint(
            config.base,
            merged,
            config.out,
            max_shard_bytes=config.max_shard_bytes,
            overwrite=config.overwrite,
            progress=True,
        )
    else:
        written = write_peft(
            merged,
            config.out,
            rank=config.rank,
            task_type=config.task_type,
            overwrite=config.overwrite,
            progress=True,
        )
    say(f"{written.path}: {written.changed} layers changed, {written.nbytes / 1e6:.2f} MB")
    if written.errors:
        worst = max(written.errors, key=lambda name: written.errors[name])
        say(f"relative error of squeezing: largest {written.errors[worst]:.3f} in {worst}")


def _config(arguments: argparse.Namespace) -> MergeConfig:
    """Return the merge that the words describe: those of a file first, options on the command line over them."""
    from ..errors import ConfigError
    from ..runs.yaml_values import read_values, set_override
    from .merge_config import read_merge

    values: dict[str, Any] = {}
    where, adapters = "the command line", arguments.adapters
    if adapters[0].endswith(ENDINGS):
        if len(adapters) > 1:
            raise ConfigError(f"{adapters[0]} is a recipe, which names its adapters: {adapters[1]} is one too many.")
        where = adapters[0]
        values = read_values(where)
    else:
        values["adapters"] = list(adapters)
    for key in ("out", "method", "base", "rank", "missing", "overwrite"):
        given = getattr(arguments, key)
        if given is not None:
            values[key] = given
    if values.get("out") is None:
        raise ConfigError("there is nowhere to write to: pass --out FOLDER, or set out in the recipe.")
    if arguments.weights is not None:
        values["adapters"] = _weighted(values.get("adapters"), arguments.weights)
    options = values.setdefault("options", {})
    for override in arguments.overrides if isinstance(options, dict) else ():
        set_override(options, override)
    return read_merge(values, where)


def _weighted(adapters: Any, weights: list[float]) -> list[dict[str, Any]]:
    from ..errors import ConfigError

    rows = adapters if isinstance(adapters, list) else []
    if len(rows) != len(weights):
        raise ConfigError(f"--weights has {len(weights)} numbers, the adapters are {len(rows)}: give one to each.")
    plain = [{"path": row} if isinstance(row, str) else dict(row) for row in rows]
    return [{**row, "weight": weight} for row, weight in zip(plain, weights, strict=True)]


def _checked(config: MergeConfig, adapters: list[Any]) -> Plan:
    """Return the merge, everything checked that can be without computing it; a dry run checks the same."""
    from ..errors import ConfigError
    from ..merge import METHODS
    from ..merge.run import make_plan

    sources = [source.path for source in config.adapters]
    check_out(config.out, config.overwrite, *([] if config.base is None else [config.base]), *sources)
    method = METHODS.get(config.method)
    statistics = sorted(STATISTICS & set(method.options)) if method is not None else []
    if statistics:
        raise ConfigError(
            f"method {config.method!r} needs {statistics[0]}, which are computed from data and cannot be given on the "
            f"command line: call moa.merge.merge(adapters, method={config.method!r}, {statistics[0]}=…) in Python."
        )
    return make_plan(
        adapters,
        config.weights,
        config.method,
        missing=config.missing,
        same_base=config.same_base,
        options=config.options,
    )


def _rank(config: MergeConfig, plan: Plan) -> int | None:
    """Return the rank to squeeze to: the one asked for, or where a method leaves no factors that of all adapters.

    Raises:
        ConfigError: the method leaves dense changes, and the adapters are dense themselves.
    """
    from ..delta import LowRank
    from ..errors import ConfigError
    from ..merge import METHODS

    if config.base is not None or config.rank is not None or plan.method.keeps_factors:
        return config.rank
    ranks = [
        max((delta.rank for delta in deltas.values() if isinstance(delta, LowRank)), default=0)
        for deltas in plan.adapters
    ]
    if all(ranks):
        return sum(ranks)
    others = ", ".join(name for name, row in METHODS.items() if row.keeps_factors)
    raise ConfigError(
        f"method {config.method!r} leaves dense changes, and an adapter holds low-rank factors: pass --rank to write "
        "the nearest change of that rank, --base to write a whole checkpoint, or --method with one that keeps factors "
        f"({others})."
    )


def _notes(config: MergeConfig, plan: Plan) -> list[str]:
    """Return what the user should know before the merge."""
    notes = list(config.left_out())
    if config.options.get("scale") == 0 or not any(plan.weights):
        what = "scale=0" if config.options.get("scale") == 0 else "all weights are 0"
        notes.append(f"{what}: the merged adapter does nothing.")
    if config.rank is not None:
        largest = max(min(delta.shape[-2:]) for deltas in plan.adapters for delta in deltas.values())
        if config.rank > largest:
            notes.append(f"rank {config.rank} is above every matrix: the largest rank there is, is {largest}.")
    return notes


def _said(config: MergeConfig, plan: Plan) -> list[str]:
    """Return what the merge would do, line by line."""
    from ..formats.tensor_files import Checkpoint
    from ..merge.write import check_targets

    row, sources = plan.method, [source.path for source in config.adapters]
    lines = [
        f"method    {row.name}: {row.definition} ({row.paper})",
        *([f"options   {', '.join(f'{key}={value}' for key, value in plan.options.items())}"] if plan.options else []),
        *(
            f"adapter   {path}: {len(deltas)} layers, weight {weight:g}, base {deltas.base or 'not named'}"
            for path, deltas, weight in zip(sources, plan.adapters, plan.weights, strict=True)
        ),
    ]
    if config.base is not None:
        base = Checkpoint(config.base)
        check_targets(base, plan.names, Path(config.base))
        lines.append(f"base      {config.base}: {len(base)} tensors in {len(base.shards)} files")
        lines.append(f"writes    {config.out}: a checkpoint, {len(plan.names)} of its tensors changed")
    else:
        rank = "its factors as they are" if config.rank is None else f"rank at most {config.rank}"
        lines += [f"note      {note}" for note in _notes(config, plan)]
        lines.append(f"writes    {config.out}: a PEFT LoRA adapter on {len(plan.names)} layers, {rank}")
    return [*lines, "dry run: nothing was written"]


def _lists() -> str:
    """Return every key of a recipe, and every method with its options and their neutral values."""
    from ..merge import METHODS
    from ..merge.options import REQUIRED
    from .merge_config import MergeConfig, Source

    lines = []
    for title, cls in (("keys of a recipe", MergeConfig), ("keys of each adapter", Source)):
        text = inspect.getdoc(cls) or ""
        lines.append(f"{title}:\n" + text.partition("Args:\n")[2].partition("\n\n")[0] + "\n")
    lines.append("methods:")
    for name, row in METHODS.items():
        options = [
            f"{key}={'REQUIRED' if o.default is REQUIRED else o.default}"
            + "".join(f" ({value} by definition={name})" for name, value in o.elsewhere.items())
            for key, o in row.options.items()
        ]
        lines.append(f"  {name} ({row.paper})" + (f": {', '.join(options)}" if options else ""))
    return "\n".join(lines)
