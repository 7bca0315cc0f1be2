"""Encoded rows into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .encode import IGNORED
from .packing import flattened


class Collator:
    """Pads encoded rows into a batch of tensors: tokens (B, S), labels (B,) or (B, S), task_ids (B,).

    Packed rows become one sequence (1, S), see `moa.runs.packing`.

    Args:
        tokenizer: says how to pad; one without a padding token pads with its end token, masked.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id = 0 if self.pad_id is None else self.pad_id  # masked, so that any token does

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of rows, padded on the right to the longest, or packed."""
        fill = {"input_ids": self.pad_id, "labels": IGNORED}
        rows = list(rows)
        if "position_ids" in rows[0]:
            return flattened(rows)
        batch: dict[str, Tensor] = {}
        for column in rows[0]:
            values = [row[column] for row in rows]
            if isinstance(values[0], list):
                longest = max(map(len, values))
                values = [value + [fill.get(column, 0)] * (longest - len(value)) for value in values]
            batch[column] = torch.tensor(values)
        return batch
