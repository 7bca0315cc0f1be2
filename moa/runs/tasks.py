"""What a task is: where its rows are and what their columns mean. Nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..errors import ConfigError, unknown_name

KINDS = ("classification", "text", "generation", "chat")
PROBLEMS = ("classification", "regression")
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet")
# kind, or "answers" for generation and chat -> measures of its evaluation rows
MEASURES = {
    "classification": ("accuracy", "loss"),
    "regression": ("rmse", "mae", "pearson", "spearman", "loss"),
    "answers": ("accuracy", "loss"),
    "text": ("loss",),
}
SMALLER_IS_BETTER = ("loss", "rmse", "mae")
READ = {  # what each kind reads
    "classification": ("text", "pair", "label", "labels", "problem"),
    "text": ("text",),
    "generation": ("prompt", "answer", "template", "answer_template"),
    "chat": ("messages", "system", "tools"),
}
LONG_ROWS = ("truncate", "skip", "refuse")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Where a task's rows are, and what its columns mean.

    Args:
        kind: "classification" (text [, pair] -> label: a class or a number), "text" (every token of it is learned),
            "generation" (prompt -> answer) or "chat" (a list of messages, put through the tokenizer's own chat
            template; only the assistant's turns are learned).
        train: file, pattern or list of files (.jsonl, .json, .csv, .tsv, .parquet, or one of the text formats with .gz
            behind it) of the training rows; with format: hub the id of a data set there.
        eval: the same for the evaluation rows; None holds out eval_fraction of the training rows.
        eval_fraction: share of the training rows held out when eval is None.
        format: "jsonl", "json", "csv", "tsv", "parquet" or "hub"; None goes by the file's ending, and takes the hub
            where subset, split or eval_split names a part of a data set.
        subset: configuration name of a hub data set.
        split: split of a hub data set for training.
        eval_split: split of a hub data set for evaluation; used when set, also where eval is None.
        text: column of the text.
        pair: column of a second text, or None.
        label: column of the label (text, number or truth value); words such as NA and null are read as written. Several
            columns are several numbers to regress.
        problem: "classification" or "regression" (squared error; scores are RMSE, MAE and correlations); None takes
            labels with fractions for a regression, all others for classes.
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
        ConfigError: unknown kind or format, a key of another kind, a value out of range, a template without its
            "{prompt}" or "{answer}".
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
    label: str | Sequence[str] = "label"
    problem: str | None = None
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
            hint = " Numbers as labels: kind: classification with problem: regression." if "regr" in self.kind else ""
            raise ConfigError(unknown_name("kind", self.kind, KINDS, "a task") + hint)
        own = READ[self.kind]
        for kind, names in READ.items():
            others = [f for f in fields(self) if f.name in names and f.name not in own]
            given = [f.name for f in others if getattr(self, f.name) != f.default]
            if given:
                raise ConfigError(
                    f"{given[0]} is read by kind {kind}, and this task's kind is {self.kind}, which reads "
                    f"{', '.join(own)}: set kind, or leave it out."
                )
        self._check_labels()
        if self.format is not None and self.format not in (*FORMATS, "hub"):
            raise ConfigError(unknown_name("format", self.format, (*FORMATS, "hub"), "a task"))
        for name in ("train", "eval", "label"):
            if getattr(self, name) in ("", (), []):
                raise ConfigError(f"{name} is empty: name a {'column' if name == 'label' else 'file'}.")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}.")
        for text, part in ((self.template, "{prompt}"), (self.answer_template, "{answer}")):
            if part not in text:
                raise ConfigError(f"template {text!r} has no {part} in it.")
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")

    def _check_labels(self) -> None:
        if self.problem is None and len(self.label_columns) < 2:
            return
        if self.problem is not None and self.problem not in PROBLEMS:
            raise ConfigError(unknown_name("problem", self.problem, PROBLEMS, "a task"))
        if len(set(self.label_columns)) < len(self.label_columns):
            raise ConfigError(f"label names a column twice: {', '.join(self.label_columns)}.")
        if self.problem == "classification" and len(self.label_columns) > 1:
            raise ConfigError(
                f"a classification has one label column, got {', '.join(self.label_columns)}: several are a regression."
            )
        if self.labels is not None and self.problem != "classification":
            raise ConfigError("labels lists classes, and a regression has none: leave it out.")

    @property
    def label_columns(self) -> list[str]:
        """Names of the label columns; of a task of text to write there are none."""
        if self.kind != "classification":
            return []
        return [self.label] if isinstance(self.label, str) else list(self.label)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that this task reads."""
        if self.kind == "chat":
            return [self.messages, *([self.tools] if self.tools else [])]
        return [*self.texts, *self.label_columns]

    @property
    def texts(self) -> list[str]:
        """Names of the columns that must hold text."""
        if self.kind == "chat":
            return []
        if self.kind == "generation":
            return [self.prompt, self.answer]
        return [self.text, *([self.pair] if self.pair and self.kind == "classification" else [])]


def measured_together(kinds: Sequence[str]) -> str | None:
    """Return the kind, a key of MEASURES, by which the evaluation rows of tasks are scored as one.

    None where only their loss says something: errors of several regressions are in units of their own, and classes are
    not scored as numbers are.

    Args:
        kinds: of the tasks, "regression" among them.
    """
    shared = {kind if kind in MEASURES else "answers" for kind in kinds}
    if len(shared) > 1 or (shared == {"regression"} and len(kinds) > 1):
        return None
    return shared.pop()
