"""`moa generate`: what a checkpoint writes after prompts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from ..runs.processes import say
from .shared_options import Command, add_import

TEXT = "\n\t\u200c\u200d"  # what written text may have that moves nothing else: lines, tabs, joined letters


def add(command: Command) -> None:
    """Add the command to a parser."""
    generate = command("generate", _generate, "let a checkpoint go on from prompts")
    generate.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT", help="one prompt")
    given.add_argument(
        "--prompts", metavar="FILE", help="a prompt a line (.txt), or .jsonl, .json, .csv, .tsv, .parquet"
    )
    generate.add_argument("--column", help="of the prompts in a table (that of the run; else prompt)")
    generate.add_argument("--out", help="file to write: .jsonl, .csv or .tsv; default: printed")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="tokens per answer at most (64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token, else drawn (0)")
    generate.add_argument("--top-p", type=float, default=1.0, help="draw among the tokens that hold this share (1)")
    generate.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    generate.add_argument("--task", metavar="NAME", help="task of the prompts, by name or id; needed if there are more")
    generate.add_argument("--raw", action="store_true", help="put no template of the task around the prompts")
    generate.add_argument("--batch-size", type=int, default=8, help="prompts per batch (8)")
    generate.add_argument("--config", help="YAML file with the tasks; default: config.yaml of the run, if it has one")
    generate.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    add_import(generate)


def _generate(arguments: argparse.Namespace) -> None:
    """Print or write what a checkpoint writes after prompts, the likeliest token each time unless told otherwise.

    The prompts get what the run's task puts around its own: its template, or the tokenizer's chat template.
    """
    from ..errors import ConfigError
    from ..runs.applied import check_file, find_applied, json_line, task_id, write_rows
    from ..runs.new_rows import read_prompts

    for name, fits, expected in (
        ("max-new-tokens", arguments.max_new_tokens >= 1, "at least 1"),
        ("batch-size", arguments.batch_size >= 1, "at least 1"),
        ("temperature", 0 <= arguments.temperature < math.inf, "at least 0"),
        ("top-p", 0 < arguments.top_p <= 1, "above 0 and at most 1"),
        ("seed", 0 <= arguments.seed < 2**32, "from 0 to 2**32 - 1"),
    ):
        if not fits:
            raise ConfigError(f"--{name} must be {expected}, got {getattr(arguments, name.replace('-', '_'))}.")
    if arguments.top_p < 1 and not arguments.temperature:
        raise ConfigError("--top-p is for tokens that are drawn: set --temperature above 0 with it.")
    if arguments.out is not None:
        check_file(arguments.out, arguments.overwrite)
    applied = find_applied(arguments.checkpoint, arguments.config)
    task = applied.task(arguments.task)
    if arguments.prompts is None:
        prompts = [(1, arguments.prompt)]
    else:
        prompts = read_prompts(applied, arguments.prompts, arguments.column, arguments.task)
    names = [] if applied.config is None else list(applied.config.tasks)
    number = task_id(arguments.task, names, str(applied.folder))
    from ..runs.progress import one_bar

    one_bar()
    rows = _written(arguments, applied, prompts, None if arguments.raw else task, number)
    if arguments.out is not None:
        write_rows(list(rows), arguments.out)
        say(f"{len(prompts)} rows", arguments.out)
        return
    for row in rows:
        if arguments.prompts is None:
            say(row["generated"], kept=TEXT)
        else:
            say(json_line(row))


def _written(
    arguments: argparse.Namespace, applied: Any, prompts: list[tuple[int, str]], task: Any, number: int | None
) -> Iterator[dict[str, Any]]:
    """Yield row, prompt and what was generated, batch by batch."""
    import torch

    from ..runs.generate import continuations, framed

    model, tokenizer = applied.loaded()
    where = str(applied.folder)
    texts, templated = framed([text for _, text in prompts], task, tokenizer, where)
    torch.manual_seed(arguments.seed)
    for start in range(0, len(texts), arguments.batch_size):
        chosen = slice(start, start + arguments.batch_size)
        written = continuations(
            model,
            tokenizer,
            texts[chosen],
            task=number,
            templated=templated,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            where=where,
        )
        for (row, prompt), text in zip(prompts[chosen], written, strict=True):
            yield {"row": row, "prompt": prompt, "generated": text}
