"""`moa predict`: classes of new rows."""

from __future__ import annotations

import argparse

from ..runs.processes import say
from .shared_options import Command, add_import


def add(command: Command) -> None:
    """Add the command to a parser."""
    predict = command("predict", _predict, "classify the rows of a file with a checkpoint")
    predict.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    predict.add_argument("--data", required=True, help="file of rows: .jsonl, .json, .csv, .tsv, .parquet")
    predict.add_argument("--out", required=True, help="file to write: .jsonl, .csv or .tsv")
    predict.add_argument(
        "--task", metavar="NAME", help="task whose head answers, by name or id; needed if there are more"
    )
    predict.add_argument("--text", metavar="COLUMN", help="of the text (that of the run; else text)")
    predict.add_argument("--pair", metavar="COLUMN", help="of the second text (that of the run)")
    predict.add_argument("--max-length", type=int, help="tokens per row at most (that of the run; else 128)")
    predict.add_argument("--batch-size", type=int, default=32, help="rows per batch (32)")
    predict.add_argument("--config", help="YAML file with the tasks; default: config.yaml of the run, if it has one")
    predict.add_argument("--overwrite", action="store_true", help="replace the file that is there")
    add_import(predict)


def _predict(arguments: argparse.Namespace) -> None:
    """Classify the rows of a file: each row's number there, its likeliest label and every label's probability.

    A label column is not needed, and not looked at. Nothing is written before every row is classified.
    """
    from ..runs.applied import check_file, find_applied, write_rows
    from ..runs.new_rows import read_texts

    check_file(arguments.out, arguments.overwrite)
    applied = find_applied(arguments.checkpoint, arguments.config)
    task, rows = read_texts(applied, arguments.data, arguments.task, arguments.text, arguments.pair)
    from ..runs.predict import predict
    from ..runs.progress import one_bar

    one_bar()
    model, tokenizer = applied.loaded()
    usual = 128 if applied.config is None else applied.config.max_length
    found = predict(
        model,
        tokenizer,
        rows,
        task,
        head=arguments.task,
        max_length=usual if arguments.max_length is None else arguments.max_length,
        batch_size=arguments.batch_size,
        where=str(applied.folder),
    )
    write_rows(found, arguments.out)
    say(f"{len(found)} rows", arguments.out)
