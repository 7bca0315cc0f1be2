"""A task's rows, split, drawn and checked: every value is of the kind that its column must hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .table_files import Rows, read_rows
from .tasks import Task
from .yaml_values import shortened

MANY = 20  # so many different numbers as labels look like a regression


@dataclass(frozen=True)
class TaskRows:
    """What a task's files hold.

    Args:
        name: of the task.
        task: its columns.
        labels: label names in the order of their ids; empty where nothing is classified.
        train: training rows.
        eval: evaluation rows.
        notes: what the user should know.
    """

    name: str
    task: Task
    labels: list[str]
    train: Rows
    eval: Rows
    notes: list[str]

    def label_ids(self, rows: Rows) -> list[int]:
        """Return the rows' classes, n of them."""
        ids = {label: i for i, label in enumerate(self.labels)}
        return [ids[value] for value in _label_texts(rows, self.task)]


def read_tasks(tasks: Mapping[str, Task], seed: int = 0) -> list[TaskRows]:
    """Return the rows of tasks; their order gives the task ids.

    Args:
        tasks: name -> task, all classified or all generated.
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
            "tasks of one run must be of one kind, since they share one kind of head (generation and chat do); got "
            f"{listing}."
        )
    return [_read_task(name, task, seed) for name, task in tasks.items()]


def _read_task(name: str, task: Task, seed: int) -> TaskRows:
    train, held_out = _splits(name, task, seed)
    for part, rows in (("training", train), ("evaluation", held_out)):
        check_rows(f"task {name!r}, {part} rows", rows, task)
    notes = []
    if task.eval is not None and task.eval == task.train and task.eval_split in (None, task.split):
        notes.append(f"{name}: eval is the file of train, so the scores are those of rows that were trained on.")
    train, held_out = _draw(train, task.max_train_rows, seed), _draw(held_out, task.max_eval_rows, seed)
    labels: list[str] = []
    if task.kind == "classification":
        labels = _label_names(name, train, task, notes)
        for rows in (train, held_out):
            _check_seen(name, rows, task, labels)
    elif task.kind == "generation":
        for part, rows in (("training", train), ("evaluation", held_out)):
            empty = sum(not str(value).strip() for value in rows.columns[task.answer])
            if empty:
                notes.append(f"{name}: {empty} of {len(rows)} {part} answers are empty: they teach the end token only.")
    return TaskRows(name, task, labels, train, held_out, notes)


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
        values = rows.columns[column]
        if column == task.tools and task.kind == "chat":
            continue  # a chat may have none
        for i, value in enumerate(values):
            if value is None or (isinstance(value, float) and math.isnan(value)):
                first = min((j for j, v in enumerate(values) if v is None or v != v), key=lambda j: rows.places[j])
                raise ConfigError(f"{where}: {rows.place(first)} has no value in column {column!r}.")
            if column in task.texts and not isinstance(value, str | int | float):
                raise ConfigError(_no_text(where, rows, i, column))
            if column == task.label and task.kind == "classification" and not isinstance(value, str | int | float):
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


# -------------------------------------------------------------------- labels


def _label_texts(rows: Rows, task: Task) -> list[str]:
    """Return the rows' labels as text, class numbers as their names."""
    names = rows.class_names.get(task.label)
    return [_label_text(value, names) for value in rows.columns[task.label]]


def _label_text(value: Any, names: Sequence[str] | None) -> str:
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _label_names(name: str, rows: Rows, task: Task, notes: list[str]) -> list[str]:
    """Return the label names: given, those of a class column, or those that the training rows hold."""
    known = rows.class_names.get(task.label)
    if task.labels is not None:
        names = [str(label) for label in task.labels]
    elif known:
        names = list(known)
    else:
        names = sorted(set(_label_texts(rows, task)), key=lambda label: (_number(label) is None, _number(label), label))
        _check_classes(name, names, task, notes)
    if len(names) < 2:
        raise ConfigError(
            f"task {name!r}: a classification needs at least 2 labels, column {task.label!r} has {names}."
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"task {name!r}: labels must differ, got {some(names)}.")
    return names


def _number(label: str) -> float | None:
    """Return a label that is a plain number as one; numbers sort in their own order, 2 before 10."""
    try:
        value = float(label) if label.strip("+-.eE0123456789") == "" else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) else None


def _check_classes(name: str, names: Sequence[str], task: Task, notes: list[str]) -> None:
    """Refuse fractions as classes, and say that many numbers look like a regression."""
    numbers = [_number(label) for label in names]
    if None in numbers:
        return
    where = f"column {task.label!r} holds {len(names)} different numbers ({some(names, 3)})"
    if any(number is not None and not number.is_integer() for number in numbers):
        raise ConfigError(
            f"task {name!r}: {where}, with fractions: this looks like a regression, and moa train classifies. Make "
            "classes of them, or list them under labels to take each for a name."
        )
    if len(names) > MANY:
        notes.append(f"{name}: {where}: trained as {len(names)} classes, though this looks like a regression.")


def _check_seen(name: str, rows: Rows, task: Task, labels: Sequence[str]) -> None:
    known = set(labels)
    unseen = sorted({value for value in _label_texts(rows, task) if value not in known})
    if unseen:
        raise ConfigError(
            f"task {name!r}: column {task.label!r} holds {some([repr(u) for u in unseen])}, which training has not "
            f"seen: the labels are {some(labels)}. List them all under labels, or drop those rows."
        )


def some(names: Sequence[str], most: int = 8) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(shortened(name, 40) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
