"""A task's rows, split, drawn and checked: every value is of the kind that its column must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .labels import check_seen, is_regression, label_names, label_texts, numbers_of, say_large
from .table_files import Rows, read_rows
from .tasks import Task
from .yaml_values import shortened


@dataclass(frozen=True)
class TaskRows:
    """What a task's files hold.

    Args:
        name: of the task.
        task: its columns.
        labels: names of the classes in the order of their ids, or of the numbers; empty where text is written.
        regresses: the labels are numbers.
        train: training rows.
        eval: evaluation rows.
        notes: what the user should know.
    """

    name: str
    task: Task
    labels: list[str]
    regresses: bool
    train: Rows
    eval: Rows
    notes: list[str]

    @property
    def kind(self) -> str:
        """The task's kind, or "regression"."""
        return "regression" if self.regresses else self.task.kind

    def targets(self, rows: Rows) -> list[int] | list[list[float]]:
        """Return the rows' classes, or their numbers, n of them."""
        if self.regresses:
            return numbers_of(self.name, rows, self.task)
        ids = {label: i for i, label in enumerate(self.labels)}
        return [ids[value] for value in label_texts(rows, self.task)]


def read_tasks(tasks: Mapping[str, Task], seed: int = 0) -> list[TaskRows]:
    """Return the rows of tasks; their order gives the task ids.

    Args:
        tasks: name -> task, all with labels or all of text to write.
        seed: of the draw of rows.

    Raises:
        ConfigError: no task or one without a name, kinds that do not go together, a file or data set that cannot be
            read, missing columns, no rows, a value of the wrong kind, labels that training has not seen.
    """
    if not tasks:
        raise ConfigError("no tasks: name at least one.")
    if any(not name.strip() for name in tasks):
        raise ConfigError("a task has an empty name: call it something, since scores and figures are shown by name.")
    if len({task.kind == "classification" for task in tasks.values()}) > 1:
        listing = ", ".join(f"{name}: {task.kind}" for name, task in tasks.items())
        raise ConfigError(
            "the tasks of one run share one model: those with labels (classes or numbers) need heads on an encoder, "
            f"those of text to write (text, generation, chat) a language model; got {listing}. Make two runs of them."
        )
    return [_read_task(name, task, seed) for name, task in tasks.items()]


def _read_task(name: str, task: Task, seed: int) -> TaskRows:
    train, held_out = _splits(name, task, seed)
    for part, rows in (("training", train), ("evaluation", held_out)):
        check_rows(f"task {name!r}, {part} rows", rows, task)
    notes = []
    if task.eval is not None and task.eval == task.train and task.eval_split in (None, task.split):
        notes.append(f"{name}: eval is the file of train, so the scores are those of rows that were trained on.")
    regresses = task.kind == "classification" and is_regression(name, task, (train, held_out))
    train, held_out = _draw(train, task.max_train_rows, seed), _draw(held_out, task.max_eval_rows, seed)
    labels: list[str] = []
    if regresses:
        labels = list(task.label_columns)
        say_large(name, task, numbers_of(name, train, task), notes)
        numbers_of(name, held_out, task)
    elif task.kind == "classification":
        labels = label_names(name, train, task, notes)
        for rows in (train, held_out):
            check_seen(name, rows, task, labels)
    elif task.kind == "generation":
        for part, rows in (("training", train), ("evaluation", held_out)):
            empty = sum(not str(value).strip() for value in rows.columns[task.answer])
            if empty:
                notes.append(f"{name}: {empty} of {len(rows)} {part} answers are empty: they teach the end token only.")
    return TaskRows(name, task, labels, regresses, train, held_out, notes)


def _splits(name: str, task: Task, seed: int) -> tuple[Rows, Rows]:
    train = read_rows(name, task.train, task.split, task)
    if task.eval is not None:
        return train, read_rows(name, task.eval, task.eval_split or task.split, task)
    if task.eval_split is not None:
        return train, read_rows(name, task.train, task.eval_split, task)
    if len(train) < 2:
        raise ConfigError(f"task {name!r} has {len(train)} row(s) in {task.train}: too few to hold any out; give eval.")
    held = min(max(1, round(task.eval_fraction * len(train))), len(train) - 1)
    order = _permutation(len(train), seed)
    return train.select(order[held:]), train.select(order[:held])


def _permutation(n: int, seed: int) -> Sequence[int]:
    import numpy as np

    return np.random.default_rng(seed).permutation(n).tolist()


def _draw(rows: Rows, at_most: int | None, seed: int) -> Rows:
    if at_most is None or at_most >= len(rows):
        return rows
    return rows.select(_permutation(len(rows), seed)[:at_most])


def check_rows(where: str, rows: Rows, task: Task, labelled: bool = True) -> None:
    """Check that rows have a task's columns, and in them values of the kind that each must hold.

    Args:
        where: what begins the error.
        rows: n of them.
        task: whose columns are looked at.
        labelled: the column of the label too.

    Raises:
        ConfigError: a missing column, no rows, or a value that is missing or of another kind; the row is named.
    """
    asked = task.columns if labelled else task.texts
    missing = [column for column in asked if column not in rows.names]
    if missing:
        raise ConfigError(
            f"{where}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, rows.names))}. "
            f"Name the columns of this {task.kind} task in its configuration."
        )
    if len(rows) == 0:
        raise ConfigError(f"{where}: no rows.")
    for column in asked:
        values, is_text, is_label = rows.columns[column], column in task.texts, column in task.label_columns
        if column == task.tools and task.kind == "chat":
            continue  # a chat may have none
        for i, value in enumerate(values):
            if value is None or (isinstance(value, float) and math.isnan(value)):
                first = min((j for j, v in enumerate(values) if v is None or v != v), key=lambda j: rows.places[j])
                raise ConfigError(f"{where}: {rows.place(first)} has no value in column {column!r}.")
            if is_text and not isinstance(value, str | int | float):
                raise ConfigError(_no_text(where, rows, i, column))
            if is_label and not isinstance(value, str | int | float):
                raise ConfigError(
                    f"{where}: one label a row is needed, and {rows.place(i)} has a {type(value).__name__} in column "
                    f"{column!r}: {shortened(repr(value), 60)}."
                )


def _no_text(where: str, rows: Rows, i: int, column: str) -> str:
    value = rows.columns[column][i]
    message = (
        f"{where}: column {column!r} must hold text, and {rows.place(i)} has a {type(value).__name__}: "
        f"{shortened(repr(value), 60)}."
    )
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and ({"role", "content"} <= set(first) or {"from", "value"} <= set(first)):
        message += f" It looks like a chat: set kind: chat and messages: {column}."
    return message
