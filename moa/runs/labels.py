"""What a task's label columns hold: classes, or numbers to regress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError
from .table_files import Rows
from .tasks import Task
from .yaml_values import shortened

MANY = 20  # so many different numbers as labels look like a regression
LARGE = 10.0  # root mean square of labels above which a squared error is far from what a fresh head starts with


def is_regression(name: str, task: Task, rows: Sequence[Rows]) -> bool:
    """Tell whether a task's labels are numbers to regress: it says so, has several columns, or they hold fractions.

    Args:
        name: of the task, for messages.
        task: its columns.
        rows: of training and of evaluation.

    Raises:
        ConfigError: fractions and words in one column.
    """
    if task.problem is not None:
        return task.problem == "regression"
    if len(task.label_columns) > 1:
        return True
    column = task.label_columns[0]
    if task.labels is not None or any(part.class_names.get(column) for part in rows):
        return False
    words, fractions = [], []
    for part in rows:
        for i, value in enumerate(part.columns[column]):
            number = as_number(value)
            if number is None:
                words.append((value, part.place(i)))
            elif not number.is_integer():
                fractions.append((value, part.place(i)))
    if words and fractions:
        raise ConfigError(
            f"task {name!r}: column {column!r} holds fractions ({_places(fractions)}) and what is not a number "
            f"({_places(words)}): numbers only are a regression. Mend those rows, or set problem: classification to "
            "take each for the name of a class."
        )
    return bool(fractions)


def _places(found: Sequence[tuple[Any, str]]) -> str:
    value, place = found[0]
    return f"{shortened(repr(value), 40)} in {place}" + (f" and {len(found) - 1} more rows" if len(found) > 1 else "")


def as_number(value: Any) -> float | None:
    """Return a label that is a plain finite number as one; None for what is not, a truth value included."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value).strip()
    try:
        number = float(text) if text.strip("+-.eE0123456789") == "" else None
    except ValueError:
        return None
    return number if number is not None and math.isfinite(number) else None


def numbers_of(name: str, rows: Rows, task: Task) -> list[list[float]]:
    """Return the numbers of rows, n lists of one for each label column.

    Raises:
        ConfigError: a value that is not a number; its row is named.
    """
    out = []
    for i in range(len(rows)):
        values = [rows.columns[column][i] for column in task.label_columns]
        numbers = [as_number(value) for value in values]
        if None in numbers:
            at = numbers.index(None)
            raise ConfigError(
                f"task {name!r}: {rows.place(i)} has {shortened(repr(values[at]), 60)} in column "
                f"{task.label_columns[at]!r}, and a regression needs a finite number there: mend the row"
                + ("." if len(values) > 1 else ", or set problem: classification.")
            )
        out.append([float(number) for number in numbers if number is not None])
    return out


def say_large(name: str, task: Task, numbers: Sequence[Sequence[float]], notes: list[str]) -> None:
    """Say which numbers (n, L) are so large that a learning rate for classes will not do."""
    for column, values in zip(task.label_columns, zip(*numbers, strict=True), strict=True):
        size = math.hypot(*values) / math.sqrt(len(values))
        if size > LARGE:
            notes.append(
                f"{name}: the numbers of column {column!r} reach from {min(values):g} to {max(values):g}: their "
                "squared errors are large, so scale them, e.g. to mean 0 and deviation 1."
            )


def label_texts(rows: Rows, task: Task) -> list[str]:
    """Return the rows' labels as text, class numbers as their names."""
    names = rows.class_names.get(task.label_columns[0])
    return [_label_text(value, names) for value in rows.columns[task.label_columns[0]]]


def _label_text(value: Any, names: Sequence[str] | None) -> str:
    if names and isinstance(value, int) and 0 <= value < len(names):
        return names[value]
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def label_names(name: str, rows: Rows, task: Task, notes: list[str]) -> list[str]:
    """Return the label names: given, those of a class column, or those that the training rows hold.

    Args:
        name: of the task, for messages.
        rows: of training.
        task: its columns.
        notes: gets what the user should know.

    Raises:
        ConfigError: less than two, or one twice.
    """
    column = task.label_columns[0]
    known = rows.class_names.get(column)
    if task.labels is not None:
        names = [str(label) for label in task.labels]
    elif known:
        names = list(known)
    else:
        names = sorted(set(label_texts(rows, task)), key=_in_order)
        _say_many(name, names, task, notes)
    if len(names) < 2:
        raise ConfigError(f"task {name!r}: a classification needs at least 2 labels, column {column!r} has {names}.")
    if len(set(names)) < len(names):
        raise ConfigError(f"task {name!r}: labels must differ, got {some(names)}.")
    return names


def _in_order(label: str) -> tuple[bool, float, str]:
    """Return what labels are sorted by: numbers first and in their own order, 2 before 10."""
    number = as_number(label)
    return number is None, 0.0 if number is None else number, label


def _say_many(name: str, names: Sequence[str], task: Task, notes: list[str]) -> None:
    """Say that many numbers look like a regression."""
    if len(names) > MANY and task.problem is None and all(as_number(label) is not None for label in names):
        notes.append(
            f"{name}: column {task.label_columns[0]!r} holds {len(names)} different numbers ({some(names, 3)}): "
            f"trained as {len(names)} classes, though this looks like a regression: then set problem: regression."
        )


def check_seen(name: str, rows: Rows, task: Task, labels: Sequence[str]) -> None:
    """Check that rows have no labels but those of training.

    Raises:
        ConfigError: they have.
    """
    known = set(labels)
    unseen = sorted({value for value in label_texts(rows, task) if value not in known})
    if unseen:
        raise ConfigError(
            f"task {name!r}: column {task.label_columns[0]!r} holds {some([repr(u) for u in unseen])}, which training "
            f"has not seen: the labels are {some(labels)}. List them all under labels, or drop those rows."
        )


def some(names: Sequence[str], most: int = 8) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(shortened(name, 40) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
