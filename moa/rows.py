"""Tensors with one row for each example, where a layer sees more: beams, flattened sequences, streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import ContextError, ShapeError


def repeat_to(values: Tensor, n_rows: int, what: str) -> Tensor:
    """Return values (B, …) with each entry repeated so that there are n_rows of them (beams, flattened sequences).

    Raises:
        ShapeError: n_rows is not a multiple of B.
    """
    if n_rows == values.shape[0]:
        return values
    if n_rows % values.shape[0]:
        raise ShapeError(f"{what} has {values.shape[0]} entries, but the layer sees {n_rows} rows.")
    return values.repeat_interleave(n_rows // values.shape[0], 0)


def example_rows(values: Tensor, x: Tensor, what: str) -> Tensor:
    """Return values (1,) or (B,) of examples, shaped to broadcast against the rows of x: (1,) or (B, 1, …).

    Raises:
        ShapeError: the rows of x (*rows, i) are not a multiple of B.
    """
    values, rows = values.to(x.device, non_blocking=True), x.shape[:-1]
    if values.numel() == 1 or not rows:
        return values[:1]
    return repeat_to(values, rows[0], what).reshape(rows[0], *([1] * (len(rows) - 1)))


def in_streams(values: Tensor, n: int) -> Tensor:
    """Return values (B, …) as n streams of the batch have them, one stream after the other, (n · B, …)."""
    return values.repeat(n, *([1] * (values.ndim - 1)))


def of_one_stream(values: Tensor, n: int) -> Tensor:
    """Return values (n · B, …) that are the same in all of n streams, as the batch has them, (B, …)."""
    return values[: values.shape[0] // n]


def each_tensor(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with its tensors (B, …) changed: itself one, or a tuple, a list or a dataclass that holds some."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(each_tensor(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: each_tensor(item, change) for name, item in held.items()})
    return value


def check_task_ids(task_ids: Tensor, known: range) -> None:
    """Check that all task ids (B,) are known.

    Raises:
        ContextError: one is not, or they are not whole numbers.
    """
    if task_ids.numel() == 0:
        return
    if task_ids.is_floating_point():
        raise ContextError(f"task ids must be whole numbers, got {task_ids.dtype}.")
    low, high = int(task_ids.min()), int(task_ids.max())
    if low < known.start or high >= known.stop:
        wrong = low if low < known.start else high
        only = f"{known.start} to {known.stop - 1}" if len(known) > 1 else f"{known.start} only"
        raise ContextError(
            f"unknown task id {wrong}: this model routes tasks {only}. Build it with more tasks, adapt it to the new "
            "one (model.adapt), or choose a recipe that falls back on uniform weights for unknown tasks."
        )
