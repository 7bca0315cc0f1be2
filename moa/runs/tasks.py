"""What a task is: where its rows are and what their columns mean. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError, unknown_name

KINDS = ("classification", "generation", "chat")
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
LONG_ROWS = ("truncate", "skip", "refuse")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a task's rows are, and what its columns mean.

    Args:
        kind: "classification" (text [, pair] -> label), "generation" (prompt -> answer) or "chat" (a list of messages,
            put through the tokenizer's own chat template; only the assistant's turns are learned).
        train: file, pattern or list of files (.jsonl, .json, .csv, .tsv, .parquet, or one of the text formats with .gz
            behind it), or hub id of the training rows.
        eval: the same for the evaluation rows; None holds out eval_fraction of the training rows.
        eval_fraction: share of the training rows held out when eval is None.
        format: "jsonl", "json", "csv", "tsv", "parquet" or "hub"; None goes by the file's ending.
        subset: configuration name of a hub data set.
        split: split of a hub data set for training.
        eval_split: split of a hub data set for evaluation; used when set, also where eval is None.
        text: column of the text.
        pair: column of a second text, or None.
        label: column of the label (text, whole number or truth value); words such as NA and null are read as written.
        labels: all label names in order; None takes those of the training rows, sorted.
        prompt: column of the prompt.
        answer: column of the answer.
        template: text around the prompt, with "{prompt}" in it.
        answer_template: text around the answer, with "{answer}" in it; learned with it, e.g. a space before it.
        messages: column of the chat: a list of {role, content}, or of ShareGPT's {from, value}.
        system: system prompt of the chats that have none, or None.
        tools: column of the tools that a chat's template shows, or None.
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
    messages: str = "messages"
    system: str | None = None
    tools: str | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(unknown_name("kind", self.kind, KINDS, "a task"))
        if self.format is not None and self.format not in (*FORMATS, "hub"):
            raise ConfigError(unknown_name("format", self.format, (*FORMATS, "hub"), "a task"))
        for name in ("train", "eval"):
            if getattr(self, name) in ("", (), []):
                raise ConfigError(f"{name} is empty: name a file.")
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
        if self.kind == "chat":
            return [self.messages, *([self.tools] if self.tools else [])]
        if self.kind == "generation":
            return [self.prompt, self.answer]
        return [self.text, *([self.pair] if self.pair else []), self.label]

    @property
    def texts(self) -> list[str]:
        """Names of the columns that must hold text."""
        if self.kind == "chat":
            return []
        return self.columns if self.kind == "generation" else self.columns[:-1]
