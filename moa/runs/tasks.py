"""Tasks from files or the hub into token batches: classification with a label set, or prompt -> answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name
from ..model.heads import MultiTaskForSequenceClassification, load_base

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "Collator",
    "EncodedTask",
    "MultiTaskForSequenceClassification",
    "Task",
    "encode_tasks",
    "load_base",
]

KINDS = ("classification", "generation")
FORMATS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}
IGNORED = -100
SHOWN = 16  # evaluation prompts kept as text


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a task's rows are, and what its columns mean.

    Args:
        kind: "classification" (text [, pair] -> label) or "generation" (prompt -> answer).
        train: file, list of files (.jsonl, .json, .csv, .parquet), or hub id of the training rows.
        eval: the same for the evaluation rows; None holds out eval_fraction of the training rows.
        eval_fraction: share of the training rows held out when eval is None.
        format: "jsonl", "json", "csv", "parquet" or "hub"; None goes by the file's ending.
        subset: configuration name of a hub data set.
        split: split of a hub data set for training.
        eval_split: split of a hub data set for evaluation; used when set, also where eval is None.
        text: column of the text.
        pair: column of a second text, or None.
        label: column of the label (text, number or truth value).
        labels: all label names in order; None takes those of the training rows, sorted.
        prompt: column of the prompt.
        answer: column of the answer.
        template: text around the prompt, with "{prompt}" in it.
        answer_template: text around the answer, with "{answer}" in it; learned with it, e.g. a space before it.
        max_train_rows: at most so many training rows, drawn with the run's seed.
        max_eval_rows: at most so many evaluation rows, drawn with the run's seed.

    Raises:
        ConfigError: unknown kind or format, a value out of range, a template without its "{prompt}" or "{answer}".
    """

    train: str | Sequence[str]
    kind: str = "classification"
    eval: str | Sequence[str] | None = None
    eval_fraction: float = 0.2
    format: str | None = None
    subset: str | None = None
    split: str = "train"
    eval_split: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    labels: Sequence[str] | None = None
    prompt: str = "prompt"
    answer: str = "answer"
    template: str = "{prompt}"
    answer_template: str = "{answer}"
    max_train_rows: int | None = None
    max_eval_rows: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("kind", self.kind, KINDS, "a task"))
        if self.format is not None and self.format not in (*FORMATS, "hub"):
            raise ConfigError(unknown_name("format", self.format, (*FORMATS, "hub"), "a task"))
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}.")
        for text, part in ((self.template, "{prompt}"), (self.answer_template, "{answer}")):
            if part not in text:
                raise ConfigError(f"template {text!r} has no {part} in it.")
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")

    @property
    def columns(self) -> list[str]:
        """Names of the columns that this task reads."""
        if self.kind == "generation":
            return [self.prompt, self.answer]
        return [self.text, *([self.pair] if self.pair else []), self.label]

    def prompts(self, rows: Dataset) -> list[str]:
        """Return the rows' prompts in their template, n of them."""
        return [self.template.replace("{prompt}", str(value)) for value in _column(rows, self.prompt)]

    def answers(self, rows: Dataset) -> list[str]:
        """Return the rows' answers in their template, n of them."""
        return [self.answer_template.replace("{answer}", str(value)) for value in _column(rows, self.answer)]


@dataclass(frozen=True)
class EncodedTask:
    """A task as token ids.

    Args:
        name: of the task.
        kind: as in `Task`.
        labels: label names in the order of their ids; empty for generation.
        train: rows with input_ids, attention_mask, labels, task_ids (and token_type_ids where the tokenizer has them).
        eval: the same for evaluation.
        prompts: a few evaluation prompts with their answers, as text; empty for classification.
    """

    name: str
    kind: str
    labels: list[str]
    train: Dataset
    eval: Dataset
    prompts: list[tuple[str, str]]


def encode_tasks(tasks: Mapping[str, Task], tokenizer: Any, max_length: int, seed: int = 0) -> list[EncodedTask]:
    """Return tasks as token ids; their order gives the task ids.

    Args:
        tasks: name -> task, all of one kind.
        tokenizer: of the base model.
        max_length: tokens per row at most; a long text loses its end, a long prompt its beginning.
        seed: of the draw of rows.

    Raises:
        ConfigError: no task, kinds mixed, a file or data set that cannot be read, missing columns, no rows, labels
            that training has not seen.
    """
    if not tasks:
        raise ConfigError("no tasks: name at least one.")
    kinds = {task.kind for task in tasks.values()}
    if len(kinds) > 1:
        listing = ", ".join(f"{name}: {task.kind}" for name, task in tasks.items())
        raise ConfigError(f"tasks of one run must be of one kind, since they share one kind of head; got {listing}.")
    return [
        _encode_task(name, number, task, tokenizer, max_length, seed)
        for number, (name, task) in enumerate(tasks.items())
    ]


def _encode_task(name: str, number: int, task: Task, tokenizer: Any, max_length: int, seed: int) -> EncodedTask:
    train, held_out = _read_splits(name, task, seed)
    for part, rows in (("training", train), ("evaluation", held_out)):
        _check_rows(f"task {name!r}, {part} rows", rows, task)
    train, held_out = _draw(train, task.max_train_rows, seed), _draw(held_out, task.max_eval_rows, seed)
    if task.kind == "generation":
        encoded = [_encode_generation(name, rows, task, tokenizer, max_length) for rows in (train, held_out)]
        some = held_out.select(range(min(SHOWN, len(held_out))))
        prompts = list(zip(task.prompts(some), task.answers(some), strict=True))
        labels: list[str] = []
    else:
        labels = _label_names(name, train, task)
        encoded = [
            _encode_classification(name, rows, task, labels, tokenizer, max_length) for rows in (train, held_out)
        ]
        prompts = []
    from datasets import Dataset

    made = [Dataset.from_dict({**columns, "task_ids": [number] * len(columns["labels"])}) for columns in encoded]
    return EncodedTask(name, task.kind, labels, made[0], made[1], prompts)


# -------------------------------------------------------------------- reading


def _read_splits(name: str, task: Task, seed: int) -> tuple[Dataset, Dataset]:
    train = _read(name, task.train, task.split, task)
    if task.eval is not None:
        return train, _read(name, task.eval, task.eval_split or task.split, task)
    if task.eval_split is not None:
        return train, _read(name, task.train, task.eval_split, task)
    if len(train) < 2:
        raise ConfigError(
            f"task {name!r} has {len(train) or 'no'} row(s) in {task.train}: too few to hold any out; give eval."
        )
    parts = train.train_test_split(test_size=max(1, round(task.eval_fraction * len(train))), seed=seed)
    return parts["train"], parts["test"]


def _read(name: str, source: str | Sequence[str], split: str, task: Task) -> Dataset:
    """Return the rows of files or of a hub data set."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    sources = [source] if isinstance(source, str) else list(source)
    kind = task.format or _format_of(name, sources[0])
    try:
        if kind == "hub":
            return load_dataset(sources[0], task.subset, split=split)
        for file in sources:
            if not Path(file).is_file():
                raise ConfigError(f"task {name!r}: no file {file} (looked from {Path.cwd()}).")
            if Path(file).stat().st_size == 0:
                raise ConfigError(f"task {name!r}: {file} has no rows, it is empty.")
        builder = load_dataset_builder(FORMATS[kind], data_files=sources)
        builder.download_and_prepare()
        if builder.info.splits["train"].num_examples == 0:
            raise ConfigError(f"task {name!r}: {', '.join(sources)} has no rows.")
        return builder.as_dataset(split="train")
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise ConfigError(f"task {name!r}: {', '.join(sources)} cannot be read as {kind}: {cause}") from error
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ConfigError(f"task {name!r}: the hub does not give {sources[0]!r}: {error}") from error


def _format_of(name: str, source: str) -> str:
    ending = Path(source).suffix.removeprefix(".").lower()
    if ending in FORMATS:
        return ending
    if Path(source).exists():
        raise ConfigError(
            f"task {name!r}: {source} does not end in one of {', '.join(f'.{f}' for f in FORMATS)}: set format."
        )
    return "hub"


def _check_rows(where: str, rows: Dataset, task: Task) -> None:
    missing = [column for column in task.columns if column not in rows.column_names]
    if missing:
        raise ConfigError(
            f"{where}: no column {', '.join(map(repr, missing))}; there are {', '.join(map(repr, rows.column_names))}. "
            f"Name the columns of this {task.kind} task in its configuration."
        )
    if len(rows) == 0:
        raise ConfigError(f"{where}: no rows.")
    for column in task.columns:
        values = _column(rows, column)
        if None in values:
            raise ConfigError(f"{where}: row {values.index(None)} has no value in column {column!r}.")


def _column(rows: Dataset, name: str) -> list[Any]:
    """Return a column's values at once: a `datasets` column read one by one is a hundred times slower."""
    return list(rows[name][:])


def _draw(rows: Dataset, at_most: int | None, seed: int) -> Dataset:
    return rows if at_most is None or at_most >= len(rows) else rows.shuffle(seed=seed).select(range(at_most))


# -------------------------------------------------------------------- encoding


def _label_names(name: str, rows: Dataset, task: Task) -> list[str]:
    """Return the label names: given, those of a class column, or those that the training rows hold."""
    known = getattr(rows.features[task.label], "names", None)
    values = set(_column(rows, task.label))
    if task.labels is not None:
        names = [str(label) for label in task.labels]
    elif known:
        names = list(known)
    else:  # numbers in their own order: 2 before 10
        names = [str(value) for value in sorted(values, key=lambda v: (isinstance(v, str), v))]
    if len(names) < 2:
        raise ConfigError(
            f"task {name!r}: a classification needs at least 2 labels, column {task.label!r} has {names}."
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"task {name!r}: labels must differ, got {names}.")
    return names


def _encode_classification(
    name: str, rows: Dataset, task: Task, labels: list[str], tokenizer: Any, max_length: int
) -> dict[str, list[Any]]:
    feature_names = getattr(rows.features[task.label], "names", None)
    values = [feature_names[v] if feature_names else str(v) for v in _column(rows, task.label)]
    unseen = sorted(set(values) - set(labels))
    if unseen:
        raise ConfigError(
            f"task {name!r}: column {task.label!r} holds {', '.join(map(repr, unseen[:5]))}, which training has not "
            f"seen: the labels are {', '.join(labels)}. List them all under labels, or drop those rows."
        )
    ids = {label: i for i, label in enumerate(labels)}
    texts = [list(map(str, _column(rows, column))) for column in (task.text, task.pair) if column]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return {**encoded, "labels": [ids[value] for value in values]}


def _encode_generation(
    name: str, rows: Dataset, task: Task, tokenizer: Any, max_length: int
) -> dict[str, list[list[int]]]:
    """Return prompt and answer as one sequence; labels are the answer and the end, -100 on the prompt."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"task {name!r}: this tokenizer has no end-of-sequence token, so answers would never end.")
    prompts = tokenizer(task.prompts(rows))["input_ids"]
    answers = tokenizer(task.answers(rows), add_special_tokens=False)["input_ids"]
    out: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer = [*answer, tokenizer.eos_token_id]
        room = max_length - len(answer)
        if room < 1:
            raise ConfigError(
                f"task {name!r}: the answer of row {i} takes {len(answer)} tokens, which leaves no room for a prompt "
                f"in max_length={max_length}."
            )
        prompt = prompt[-room:]  # its end holds the question
        out["input_ids"].append(prompt + answer)
        out["attention_mask"].append([1] * (len(prompt) + len(answer)))
        out["labels"].append([IGNORED] * len(prompt) + answer)
    return out


class Collator:
    """Pads encoded rows into a batch of tensors: tokens (B, S), labels (B,) or (B, S), task_ids (B,).

    Args:
        tokenizer: says how to pad; one without a padding token pads with its end token, masked.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def __call__(self, rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of rows, padded on the right to the longest."""
        fill = {"input_ids": self.pad_id, "labels": IGNORED}
        rows = list(rows)
        batch = {}
        for column in rows[0]:
            values = [row[column] for row in rows]
            if isinstance(values[0], list):
                longest = max(map(len, values))
                values = [value + [fill.get(column, 0)] * (longest - len(value)) for value in values]
            batch[column] = torch.tensor(values)
        return batch
