"""Rows into token ids: a class per text, or a sequence of which the answers are learned."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .chat import Conversations
from .table_files import Rows
from .task_rows import TaskRows, read_tasks
from .tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
NEAR_IGNORED = -100.00001
SHOWN = 16  # evaluation prompts kept as text


@dataclass(frozen=True)
class EncodedTask:
    """A task as token ids.

    Args:
        name: of the task.
        kind: as in `Task`, or "regression".
        labels: names of the classes in the order of their ids, or of the numbers; empty where text is written.
        train: rows with input_ids, attention_mask, labels, task_ids (and token_type_ids where the tokenizer has them).
        eval: the same for evaluation.
        prompts: a few evaluation prompts with their answers, as text; empty for classification.
        notes: what the user should know, e.g. how many rows were cut.
    """

    name: str
    kind: str
    labels: list[str]
    train: Dataset
    eval: Dataset
    prompts: list[tuple[str, str]]
    notes: list[str]

    @property
    def writes(self) -> bool:
        """Whether the task is text to write, and not labels."""
        return self.kind not in ("classification", "regression")

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these rows from others: label names, and a digest of the training rows' ids and labels."""
        digest = hashlib.sha256()
        for column in ("input_ids", "labels"):
            digest.update(json.dumps(list(self.train[column][:])).encode())
        return {"labels": self.labels, "rows": digest.hexdigest()}


@dataclass
class Encoded:
    """Rows on their way: the columns, and which rows are too long.

    Args:
        columns: name -> one value a row.
        too_long: (row, tokens) of those that were longer than allowed.
        kept: rows that stay, in order.
    """

    columns: dict[str, list[Any]]
    too_long: list[tuple[int, int]]
    kept: list[int]


def encode_tasks(
    tasks: Mapping[str, Task], tokenizer: Any, max_length: int, seed: int = 0, long_rows: str = "truncate"
) -> list[EncodedTask]:
    """Return tasks as token ids; their order gives the task ids.

    Args:
        tasks: name -> task, all with labels or all of text to write.
        tokenizer: of the base model.
        max_length: tokens per row at most.
        seed: of the draw of rows.
        long_rows: what becomes of longer ones, see `encode_rows`.

    Raises:
        ConfigError: see `moa.runs.task_rows.read_tasks` and `encode_rows`.
    """
    return encode_rows(read_tasks(tasks, seed), tokenizer, max_length, long_rows)


def encode_rows(
    tasks: Sequence[TaskRows], tokenizer: Any, max_length: int, long_rows: str = "truncate"
) -> list[EncodedTask]:
    """Return the rows of tasks as token ids; their order gives the task ids.

    Args:
        tasks: read and checked.
        tokenizer: of the base model.
        max_length: tokens per row at most.
        long_rows: "truncate": a text or a chat loses its end, a prompt its beginning; "skip" or "refuse" them.

    Raises:
        ConfigError: rows without a token, answers that leave no room for a prompt, rows too long where that is refused,
            no rows left, or a tokenizer that lacks an end or a chat template.
    """
    made = [_encode_task(number, rows, tokenizer, max_length, long_rows) for number, rows in enumerate(tasks)]
    return [_beside_numbers(task) for task in made] if any(rows.regresses for rows in tasks) else made


def _encode_task(number: int, task: TaskRows, tokenizer: Any, max_length: int, long_rows: str) -> EncodedTask:
    from datasets import Dataset

    notes, made = list(task.notes), []
    encoders = {"classification": _classification, "text": _text, "generation": _generation, "chat": _chat}
    for part, rows in (("training", task.train), ("evaluation", task.eval)):
        encoded = encoders[task.task.kind](task, rows, tokenizer, max_length, long_rows)
        _say_long(task.name, part, rows, encoded, max_length, long_rows, notes)
        columns = {name: [values[i] for i in encoded.kept] for name, values in encoded.columns.items()}
        if not encoded.kept:
            raise ConfigError(
                f"task {task.name!r}: none of the {part} rows is left within max_length={max_length}: raise it."
            )
        made.append(Dataset.from_dict({**columns, "task_ids": [number] * len(encoded.kept)}))
    prompts = _prompts(task, task.eval.select(range(min(SHOWN, len(task.eval)))), tokenizer)
    return EncodedTask(task.name, task.kind, task.labels, made[0], made[1], prompts, notes)


def _say_long(
    name: str, part: str, rows: Rows, encoded: Encoded, max_length: int, long_rows: str, notes: list[str]
) -> None:
    """Say or refuse what is longer than max_length."""
    if not encoded.too_long:
        return
    first, length = encoded.too_long[0]
    what = f"{len(encoded.too_long)} of {len(rows)} {part} rows are longer than max_length={max_length}"
    if long_rows == "refuse":
        raise ConfigError(
            f"task {name!r}: {what}, first {rows.place(first)} with {length} tokens: raise max_length, or set "
            "long_rows to truncate or skip."
        )
    lost = len(encoded.columns["labels"]) - len(encoded.kept)
    said = f"{what} and were {'truncated' if long_rows == 'truncate' else 'left out'}."
    if lost and long_rows == "truncate":
        said += f" {lost} of them kept nothing to learn and were left out."
    notes.append(f"{name}: {said}")


def _classification(task: TaskRows, rows: Rows, tokenizer: Any, max_length: int, long_rows: str) -> Encoded:
    encoded = encode_texts(task.name, task.task, rows, tokenizer, max_length, long_rows)
    encoded.columns["labels"] = list(task.targets(rows))
    return encoded


def _beside_numbers(task: EncodedTask) -> EncodedTask:
    """Return a task in a run that has a regression: every row's labels are a list of numbers, a class among them."""

    def listed(value: Any) -> list[float]:
        numbers = value if isinstance(value, list) else [value]
        # the one number that means "not labelled" moves by a rounding step of float32
        return [NEAR_IGNORED if number == IGNORED else float(number) for number in numbers]

    train, held_out = (
        rows.remove_columns("labels").add_column("labels", [listed(value) for value in rows["labels"]])  # type: ignore[call-arg]
        for rows in (task.train, task.eval)
    )
    return dataclasses.replace(task, train=train, eval=held_out)


def encode_texts(
    name: str, task: Task, rows: Rows, tokenizer: Any, max_length: int, long_rows: str = "truncate"
) -> Encoded:
    """Return the texts of rows, or their pairs of texts, as token ids, n lists of at most max_length.

    Args:
        name: of the task, for messages.
        task: which columns hold the texts.
        rows: n of them, whose texts are checked.
        tokenizer: of the base model.
        max_length: tokens per row at most.
        long_rows: longer rows lose their end, unless this is "skip".

    Raises:
        ConfigError: a row without a token.
    """
    names = (task.text, task.pair)
    texts = [[str(value) for value in rows.columns[column]] for column in names if column]
    columns = dict(tokenizer(*texts, verbose=False))
    lengths = [len(ids) for ids in columns["input_ids"]]
    _check_tokens(name, rows, lengths)
    too_long = [(i, n) for i, n in enumerate(lengths) if n > max_length]
    kept = list(range(len(rows)))
    if too_long and long_rows == "skip":
        kept = [i for i, n in enumerate(lengths) if n <= max_length]
    elif too_long:
        at = [i for i, _ in too_long]
        cut = tokenizer(*[[text[i] for i in at] for text in texts], truncation=True, max_length=max_length)
        for column, values in cut.items():
            for i, value in zip(at, values, strict=True):
                columns[column][i] = value
    return Encoded(columns, too_long, kept)


def _check_tokens(name: str, rows: Rows, lengths: Sequence[int]) -> None:
    empty = [i for i, n in enumerate(lengths) if n == 0]
    if empty:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise ConfigError(f"task {name!r}: {rows.place(empty[0])}{more} holds not one token: drop or fill it.")


def _prompt_texts(task: Task, rows: Rows) -> list[str]:
    return [task.template.replace("{prompt}", str(value)) for value in rows.columns[task.prompt]]


def _answer_texts(task: Task, rows: Rows) -> list[str]:
    return [task.answer_template.replace("{answer}", str(value)) for value in rows.columns[task.answer]]


def _text(task: TaskRows, rows: Rows, tokenizer: Any, max_length: int, long_rows: str) -> Encoded:
    """Return whole texts and an end; labels are all of it, of which a model never predicts the first token."""
    end = _end_of(task.name, tokenizer)
    texts = [str(value) for value in rows.columns[task.task.text]]
    whole = [ids if ids[-1:] == [end] else [*ids, end] for ids in tokenizer(texts, verbose=False)["input_ids"]]
    too_long = [(i, len(ids)) for i, ids in enumerate(whole) if len(ids) > max_length]
    at = {i for i, _ in too_long} if long_rows == "skip" else set()
    # a text of one token, cut or empty, has nothing that is predicted from something
    kept = [i for i, ids in enumerate(whole) if i not in at and len(ids[:max_length]) > 1]
    cut = [ids[:max_length] for ids in whole]
    columns = {
        "input_ids": cut,
        "attention_mask": [[1] * len(ids) for ids in cut],
        "labels": [list(ids) for ids in cut],
    }
    _check_tokens(task.name, rows, [len(ids) - (ids[-1:] == [end]) for ids in whole])
    return Encoded(columns, too_long, kept)


def _generation(task: TaskRows, rows: Rows, tokenizer: Any, max_length: int, long_rows: str) -> Encoded:
    """Return prompt and answer as one sequence; labels are the answer and the end, -100 on the prompt."""
    end = _end_of(task.name, tokenizer)
    prompts = tokenizer(_prompt_texts(task.task, rows), verbose=False)["input_ids"]
    answers = tokenizer(_answer_texts(task.task, rows), add_special_tokens=False, verbose=False)["input_ids"]
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    too_long, kept, full = [], [], []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        answer = [*answer, end]
        room = max_length - len(answer)
        if room < len(prompt):
            too_long.append((i, len(prompt) + len(answer)))
        if room < 1:
            full.append((i, len(answer)))
        if room >= len(prompt) or long_rows != "skip":
            kept.append(i)
        prompt = prompt[max(0, len(prompt) - room) :] if room > 0 else []  # its end holds the question
        columns["input_ids"].append(prompt + answer)
        columns["attention_mask"].append([1] * (len(prompt) + len(answer)))
        columns["labels"].append([IGNORED] * len(prompt) + answer)
    if full and long_rows == "truncate":
        row, length = full[0]
        raise ConfigError(
            f"task {task.name!r}: the answers of {len(full)} of {len(rows)} rows leave no room for a prompt in "
            f"max_length={max_length}; the answer of {rows.place(row)} takes {length} tokens. Raise max_length, or set "
            "long_rows: skip to leave such rows out."
        )
    return Encoded(columns, too_long, kept)


def _end_of(name: str, tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"task {name!r}: this tokenizer has no end-of-sequence token, so answers would never end.")
    return int(tokenizer.eos_token_id)


def _chat(task: TaskRows, rows: Rows, tokenizer: Any, max_length: int, long_rows: str) -> Encoded:
    """Return whole chats; labels are the assistant's turns, -100 elsewhere."""
    chats = Conversations(task.name, task.task, tokenizer)
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    too_long, kept = [], []
    for i in range(len(rows)):
        for ids, learned in chats.encoded(rows, i):
            labels = [token if own else IGNORED for token, own in zip(ids, learned, strict=True)][:max_length]
            if len(ids) > max_length:
                too_long.append((i, len(ids)))
            # what is cut may have been the only answer: a row that teaches nothing is left out
            if (len(ids) <= max_length or long_rows == "truncate") and any(label != IGNORED for label in labels):
                kept.append(len(columns["labels"]))
            columns["input_ids"].append(ids[:max_length])
            columns["attention_mask"].append([1] * len(labels))
            columns["labels"].append(labels)
    return Encoded(columns, too_long, kept)


def _prompts(task: TaskRows, rows: Rows, tokenizer: Any) -> list[tuple[str, str]]:
    """Return prompts and answers as text."""
    if task.task.kind == "generation":
        return list(zip(_prompt_texts(task.task, rows), _answer_texts(task.task, rows), strict=True))
    if task.task.kind == "chat":
        chats = Conversations(task.name, task.task, tokenizer)
        return [chats.last_turn(rows, i) for i in range(len(rows))]
    return []
