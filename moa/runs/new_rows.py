"""New rows for a checkpoint: texts to classify, prompts to go on from. Nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .applied import Applied
from .table_files import Rows, read_rows
from .task_rows import check_rows
from .tasks import Task
from .yaml_values import is_file


def read_texts(applied: Applied, data: str, task: str | None, text: str | None, pair: str | None) -> tuple[Task, Rows]:
    """Return the rows to classify, n of them, and the columns that hold their texts.

    Args:
        applied: whose run says the columns.
        data: file or pattern, in a format that `moa train` reads.
        task: name or id of a task of the run.
        text: column of the text, in place of the run's.
        pair: column of the second text, in place of the run's.

    Raises:
        ConfigError: a task that is not the run's or does not classify, a file that cannot be read, a missing column, a
            value that is not text.
    """
    known = applied.task(task)
    if known is not None and known.kind != "classification":
        raise ConfigError(f"{applied.folder} was trained on tasks of kind {known.kind}: use moa generate.")
    usual = Task(train=data) if known is None else known
    own = Task(train=data, kind=usual.kind, text=text or usual.text, pair=pair or usual.pair)
    rows = read_rows("predict", data, own.split, own)
    missing = [column for column in own.texts if column not in rows.names]
    if missing:
        raise ConfigError(
            f"{data}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, rows.names))}. Name "
            "the columns of the texts with --text and --pair."
        )
    check_rows(data, rows, own, labelled=False)
    return own, rows


def read_prompts(applied: Applied, file: str, column: str | None, task: str | None) -> list[tuple[int, str]]:
    """Return the prompts of a file, each with its number there, from 1 on.

    Args:
        applied: whose run says the column.
        file: a prompt a line (.txt), or a table in a format that `moa train` reads.
        column: of the prompt, in place of the run's.
        task: name or id of a task of the run.

    Raises:
        ConfigError: a file that cannot be read or has no prompts, a missing column, a value that is not text.
    """
    if file.endswith(".txt"):
        if not is_file(file):
            raise ConfigError(f"there is no file {file} (looked from {Path.cwd()}).")
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (UnicodeDecodeError, OSError) as error:
            raise ConfigError(f"{file} cannot be read: {error}.") from error
        found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise ConfigError(f"{file} has no prompts.")
        return found
    known = applied.task(task)
    usual = {"generation": known.prompt, "text": known.text} if known is not None else {}
    name = column or (usual.get(known.kind, "prompt") if known is not None else "prompt")
    own = Task(train=file, text=name)
    rows = read_rows("generate", file, own.split, own)
    if name not in rows.names:
        there = ", ".join(map(repr, rows.names))
        raise ConfigError(f"{file}: no column {name!r}; there are {there}. Name the prompts' column with --column.")
    check_rows(file, rows, own, labelled=False)
    return [(number, str(text)) for (_, number), text in zip(rows.places, rows.columns[name], strict=True)]
