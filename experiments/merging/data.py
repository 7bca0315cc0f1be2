"""Real tasks as rows; training, validation and test rows are disjoint. What lies below the adapters runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from moa.model.heads import MultiTaskForSequenceClassification
from moa.runs.encode import encode_tasks
from moa.runs.tasks import Task

Rows = Sequence[dict[str, Any]]
FILES = {
    "sarcasm": "sarcasm/sarcasm",
    "tweets": "vader/tweets",
    "amazon": "vader/amazon",
    "movie": "vader/movie",
    "nyt": "vader/nyt",
}


@dataclass(frozen=True)
class TaskRows:
    """One task.

    Args:
        name: of the task.
        labels: its label names.
        train: rows to learn from.
        validation: rows that choose learning rates and merge coefficients; from the training file, not learned from.
        test: rows that the accuracies are of; from the evaluation file.
    """

    name: str
    labels: list[str]
    train: Rows
    validation: Rows
    test: Rows


def load(
    model: str, cache: Path, names: Sequence[str], sizes: tuple[int, int, int], length: int, seed: int
) -> list[TaskRows]:
    """Return the tasks with rows of token ids, drawn with a seed.

    Args:
        model: whose tokenizer is used.
        cache: folder that `moa demo` filled.
        names: tasks, in `FILES`.
        sizes: training, validation and test rows of each task.
        length: tokens per row at most.
        seed: of the draw.
    """
    n_train, n_validation, n_test = sizes
    tasks = {
        name: Task(
            train=str(cache / f"{FILES[name]}.train.jsonl"),
            eval=str(cache / f"{FILES[name]}.eval.jsonl"),
            max_train_rows=n_train + n_validation,
            max_eval_rows=n_test,
        )
        for name in names
    }
    out = []
    for task in encode_tasks(tasks, AutoTokenizer.from_pretrained(model), length, seed):
        drawn = task.train.to_list()
        out.append(TaskRows(task.name, task.labels, drawn[:n_train], drawn[n_train:], task.eval.to_list()))
    return out


class Given(nn.Module):
    """Stands for the embeddings: hands on the states (B, S, d) that it is given."""

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """Return inputs_embeds (B, S, d)."""
        return inputs_embeds


def upper(base: MultiTaskForSequenceClassification, layers: int) -> MultiTaskForSequenceClassification:
    """Return a copy of a BERT base with its last layers alone, which takes states (B, S, d) in place of token ids."""
    top = copy.deepcopy(base)
    top.encoder.embeddings = Given()
    top.encoder.encoder.layer = top.encoder.encoder.layer[-layers:]  # type: ignore[union-attr, index]
    return top


@torch.no_grad()
def below(base: MultiTaskForSequenceClassification, layers: int, tasks: Sequence[TaskRows]) -> list[TaskRows]:
    """Return the tasks with the states (S, d) below the last layers in place of token ids: adapters never change them.

    Args:
        base: a BERT base.
        layers: how many last layers are left out.
        tasks: rows of token ids.
    """
    base.eval()

    def states(rows: Rows) -> Rows:
        done: dict[int, dict[str, Any]] = {}
        for part in by_length(list(enumerate(rows)), 50, lambda pair: pair[1]["input_ids"]):
            ids = pad_sequence([torch.tensor(row["input_ids"]) for _, row in part], batch_first=True)
            mask = pad_sequence([torch.ones(len(row["input_ids"])) for _, row in part], batch_first=True)
            hidden = base.encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1 - layers]
            for (place, row), own in zip(part, hidden, strict=True):
                kept = own[: len(row["input_ids"])].clone()
                done[place] = {"states": kept, "labels": row["labels"], "task_ids": row["task_ids"]}
        return [done[place] for place in range(len(rows))]

    return [
        TaskRows(task.name, task.labels, states(task.train), states(task.validation), states(task.test))
        for task in tasks
    ]


def collate(rows: Rows) -> dict[str, Tensor]:
    """Return a batch: inputs_embeds (B, S, d) padded on the right, attention_mask (B, S), labels and task_ids (B,)."""
    return {
        "inputs_embeds": pad_sequence([row["states"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence([torch.ones(len(row["states"])) for row in rows], batch_first=True),
        "labels": torch.tensor([row["labels"] for row in rows]),
        "task_ids": torch.tensor([row["task_ids"] for row in rows]),
    }


def by_length(rows: Sequence[Any], size: int, of: Callable[[Any], Any] = lambda row: row["states"]) -> Iterator[Any]:
    """Yield batches of rows of about one length: little is padding."""
    ordered = sorted(rows, key=lambda row: len(of(row)))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


@torch.no_grad()
def accuracy(model: Any, rows: Rows, size: int = 50) -> float:
    """Return the share of right answers of a model, whose logits are (B, C)."""
    model.eval()
    right = 0
    for part in by_length(rows, size):
        batch = collate(part)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(rows)
