"""A checkpoint's classes or numbers for new rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from ..training.divergence import gives_numbers
from .applied import task_id
from .collate import Collator
from .encode import encode_texts
from .processes import say
from .table_files import Rows
from .tasks import Task


def predict(
    model: MoAModel,
    tokenizer: Any,
    rows: Rows,
    task: Task,
    *,
    head: str | None = None,
    max_length: int = 128,
    batch_size: int = 32,
    where: str = "the checkpoint",
) -> list[dict[str, Any]]:
    """Return for each row its place in its file, the likeliest label, and the probability of every label.

    Where numbers are regressed: the row's place and its "value", or its "values" by name where there are several.

    Args:
        model: with heads per task, or a classifier of transformers.
        tokenizer: of its base.
        rows: n of them.
        task: columns of the texts.
        head: name or id of the task whose head answers; None where there is one.
        max_length: tokens per row at most; longer rows lose their end, and how many is said.
        batch_size: B, rows per forward.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: a base that does not classify, no such task, a batch without rows, positions that do not suffice.
    """
    if batch_size < 1 or max_length < 2:
        raise ConfigError(f"--batch-size {batch_size} must be at least 1 and --max-length {max_length} at least 2.")
    number, labels, regresses = _labels(model, head, where)
    encoded = encode_texts("predict", task, rows, tokenizer, max_length)
    if encoded.too_long:
        say(f"note: {len(encoded.too_long)} of {len(rows)} rows are longer than {max_length} tokens and were truncated")
    taken = set(inspect.signature(model.base.forward).parameters)
    columns = {name: values for name, values in encoded.columns.items() if name in taken}
    logits = logits_of_rows(model, Collator(tokenizer), columns, number, batch_size)
    places = [place for _, place in rows.places]
    if regresses:
        found = [dict(zip(labels, row, strict=False)) for row in logits.tolist()]
        if len(labels) == 1:
            return [{"row": place, "value": row[labels[0]]} for place, row in zip(places, found, strict=True)]
        return [{"row": place, "values": row} for place, row in zip(places, found, strict=True)]
    out = []
    for place, row in zip(places, logits.softmax(-1).tolist(), strict=True):
        best = max(range(len(labels)), key=row.__getitem__)
        out.append({"row": place, "label": labels[best], "probabilities": dict(zip(labels, row, strict=False))})
    return out


@torch.no_grad()
def logits_of_rows(
    model: MoAModel, collator: Collator, columns: Mapping[str, Sequence[Any]], task: int | None, batch_size: int
) -> Tensor:
    """Return the logits (n, C) of encoded rows, n lists of token ids; −∞ for outputs of other tasks.

    Args:
        model: in evaluation mode.
        collator: pads.
        columns: name -> n values.
        task: id of all rows' task, or None.
        batch_size: B, rows per forward.
    """
    n_rows = len(columns["input_ids"])
    parts = []
    for start in range(0, n_rows, batch_size):
        batch = collator([{k: v[i] for k, v in columns.items()} for i in range(start, min(start + batch_size, n_rows))])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        if task is not None:
            batch["task_ids"] = torch.full((len(batch["input_ids"]),), task, device=model.device)
        parts.append(model(**batch).logits.float().cpu())
    return torch.cat(parts)


def _labels(model: MoAModel, head: str | None, where: str) -> tuple[int | None, list[str], bool]:
    """Return the id of the task whose head answers, its labels in the order of the logits (B, C), and if numbers."""
    tasks = getattr(model.config, "labels", None)
    if isinstance(tasks, Mapping):
        number = task_id(head, list(tasks), where)
        assert number is not None
        name = list(tasks)[number]
        return number, list(tasks[name]), name in model.config.regressions
    if "ForSequenceClassification" not in type(model.base).__name__:
        raise ConfigError(f"{where} was made on a {type(model.base).__name__}, which does not classify texts.")
    kind = model.config.problem_type
    if kind == "multi_label_classification":
        raise ConfigError(f"{where} has problem_type={kind!r}: one label a row can be predicted, or numbers.")
    names = model.config.id2label
    return task_id(head, [], where), [str(names[i]) for i in range(len(names))], gives_numbers(model)
