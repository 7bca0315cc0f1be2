"""Tensors with one row for each example, where a layer sees more: beams, flattened sequences, streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
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


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRows:
    """Of which example the rows of a batch's images are: of that in whose text an image has places.

    A model that puts L rows of images into N places of its texts does so in order, as many rows a place or places a
    row for all of them. So row l belongs to the example of place l · N / L, whether the rows are images, their patches
    one after the other, or what is left of them.

    Args:
        counts: (B,) int64 places in each example.
        tokens: (B, S) of the texts, whose own rows belong to the examples in turn; None where all rows are images'.
    """

    counts: Tensor
    tokens: tuple[int, int] | None = None
    _found: dict[int, Tensor] = dataclasses.field(default_factory=dict, repr=False)

    def spread(self, values: Tensor, rows: tuple[int, ...], what: str) -> Tensor:
        """Return values (B,) of examples for rows (L,), (L, …) or, flattened, (1, L), as (L, 1, …) or (1, L).

        Raises:
            ContextError: it cannot be told of which example the rows are.
        """
        if rows[:2] == self.tokens:
            return in_turn(values, rows, what)
        flattened = len(rows) == 2 and rows[0] == 1
        n_rows = rows[1] if flattened else rows[0]
        examples = self._examples(n_rows, what)
        found = repeat_to(values, self.counts.numel(), what).to(examples.device)[examples]
        return found.unsqueeze(0) if flattened else found.reshape(n_rows, *([1] * (len(rows) - 1)))

    def _examples(self, n_rows: int, what: str) -> Tensor:
        """Return the example of each row, (L,)."""
        if n_rows not in self._found:
            ends = self.counts.cumsum(0)  # (B,)
            places, row = ends[-1], torch.arange(n_rows, device=ends.device)
            first = torch.searchsorted(ends, row * places // n_rows, right=True)
            if not torch.compiler.is_compiling():
                last = torch.searchsorted(ends, ((row + 1) * places - 1) // n_rows, right=True)
                n = int(places)
                if not n or max(n, n_rows) % min(n, n_rows) or not bool((first == last).all()):
                    raise ContextError(
                        f"{what}: the texts have {n} places for images and a layer sees {n_rows} rows of them, so it "
                        "cannot be told of which example each is: leave the images' part out with exclude=[…], or "
                        "give one example at a time."
                    )
            self._found[n_rows] = first
        return self._found[n_rows]


def example_rows(values: Tensor, x: Tensor, what: str, images: ImageRows | None = None) -> Tensor:
    """Return values (1,) or (B,) of examples, shaped to broadcast against the rows of x: (1,) or (B, 1, …).

    Args:
        values: (1,) or (B,).
        x: (*rows, i).
        what: their name, for messages.
        images: of which example rows of images are; None where the rows are the examples in turn.

    Raises:
        ShapeError: the rows of x (*rows, i) are not a multiple of B.
        ContextError: it cannot be told of which example rows of images are.
    """
    values, rows = values.to(x.device, non_blocking=True), x.shape[:-1]
    if values.numel() == 1 or not rows:
        return values[:1]
    return in_turn(values, rows, what) if images is None else images.spread(values, tuple(rows), what)


def in_turn(values: Tensor, rows: tuple[int, ...], what: str) -> Tensor:
    """Return values (B,) of examples for rows (L, …) that are the examples in turn, as (L, 1, …).

    Raises:
        ShapeError: L is not a multiple of B.
    """
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


def seen_by_head(values: tuple[Tensor, ...], inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return tensors (B, S, …), and behind them the rows of each that a head sees that is told which logits to keep.

    Args:
        values: of all tokens.
        inputs: of the model; `logits_to_keep` is the number of the last ones, 0 or None for all, or places (n,).
    """
    kept = inputs.get("logits_to_keep")
    if kept is None or (isinstance(kept, int) and not kept):
        return values
    part = slice(-kept, None) if isinstance(kept, int) else kept
    return (*values, *[value[:, part] for value in values])
