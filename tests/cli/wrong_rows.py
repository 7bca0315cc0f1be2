"""The inputs of the list of wrong inputs to `moa train`, as changes of a configuration; each says of which row."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from tests.tiny_run import tokenizer, write_jsonl

from .test_wrong_inputs import TWO, Change, Values, broken_rows, cut, empty_text, file, labelled, poisoned, sets

Case = tuple[str, Change, str]  # kind of the tasks, change of the configuration, what is said
TALK = [{"role": "user", "content": "it"}, {"role": "assistant", "content": "was"}]


def lines(*rows: dict[str, Any]) -> str:
    """Return JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def training(**values: Any) -> Change:
    """Return a change of several arguments of training."""

    def change(home: Path, config: Values) -> None:
        config["training"].update(values)

    return change


def all_of(*changes: Change) -> Change:
    """Return one change of several."""

    def change(home: Path, values: Values) -> None:
        for one in changes:
            one(home, values)

    return change


def few_positions(home: Path, values: Values) -> None:
    """Texts of 60 tokens and max_length 64, on a base of 32 positions."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=32, max_position_embeddings=32, **size)).save_pretrained(home / "short")
    tokenizer().save_pretrained(home / "short")
    values |= {"base": str(home / "short"), "max_length": 64}
    file("x.jsonl", lines(*({"text": "it " * 60, "label": i % 2} for i in range(8))))(home, values)


def many_labels(home: Path, values: Values) -> None:
    """3,000 labels in training, and some that are only in the evaluation rows."""
    files = {
        part: str(write_jsonl(home / f"{part}.jsonl", [{"text": "it", "label": f"l{i}"} for i in range(n)]))
        for part, n in (("train", 3000), ("eval", 3400))
    }
    values["tasks"] = {"mine": files}


def nameless(home: Path, values: Values) -> None:
    """A task with an empty name."""
    values["tasks"][""] = values["tasks"].pop("first")


def with_dollars(home: Path, values: Values) -> None:
    """A task called $a_$, and a figure with it at the first log step."""
    values["tasks"]["$a_$"] = values["tasks"].pop("first")
    values["training"]["logging_steps"] = 1


def scored_on_itself(home: Path, values: Values) -> None:
    """Evaluation rows from the file of the training rows."""
    values["tasks"]["first"]["eval"] = values["tasks"]["first"]["train"]


def a_pattern(home: Path, values: Values) -> None:
    """A pattern of files."""
    for number in range(2):
        shutil.copy(values["tasks"]["first"]["train"], home / f"part{number}.jsonl")
    values["tasks"] = {"mine": {"train": str(home / "part*.jsonl")}}


def numbers(home: Path, values: Values) -> None:
    """30 different numbers as labels, each of them in training."""
    rows = lines(*({"text": "it was", "label": i} for i in range(30)))
    file("x.jsonl", rows, eval=values["tasks"]["first"]["train"])(home, values)
    (home / "y.jsonl").write_text(rows)
    values["tasks"]["mine"]["eval"] = str(home / "y.jsonl")


def generation(name: str, *rows: dict[str, Any], **task: Any) -> Change:
    """Return a change that trains on prompts and answers of its own."""
    return file(name, lines(*rows), kind="generation", **task)


LONG = [{"prompt": "it", "answer": "was"}] * 7 + [{"prompt": "it", "answer": "was " * 40}]
CLASSES, TEXTS = "classification", "generation"

REFUSED: dict[str, Case] = {
    "1 a CSV file called parquet": (CLASSES, file("x.parquet", TWO), "x.parquet cannot be read as parquet"),
    "2 dtype fp16": (CLASSES, sets("dtype", "fp16"), "unknown dtype 'fp16'. Did you mean 'float16'?"),
    "3 a learning rate as text": (CLASSES, training(learning_rate="1e-3x"), "training.learning_rate must be a number"),
    "4 a learning rate of NaN": (CLASSES, training(learning_rate=float("nan")), "learning_rate must be a finite"),
    "4 a negative learning rate": (CLASSES, training(learning_rate=-0.001), "learning_rate must be a positive number"),
    "5 max_steps in words": (CLASSES, training(max_steps="ten"), "max_steps must be a whole number"),
    "5 max_steps null": (CLASSES, training(max_steps=None), "max_steps must be a whole number"),
    "6 a batch of 0": (CLASSES, training(per_device_train_batch_size=0), "train_batch_size must be at least 1, got 0"),
    "7 accumulation of 0": (CLASSES, training(gradient_accumulation_steps=0), "steps must be at least 1, got 0"),
    "8 a compiler": (CLASSES, training(torch_compile_backend="nope"), "unknown backend 'nope'"),
    "10 wandb": (CLASSES, training(report_to="wandb"), "pip install wandb"),
    "10 deepspeed": (CLASSES, training(deepspeed="ds.json"), "training.deepspeed: ds.json"),
    "10 liger": (CLASSES, training(use_liger_kernel=True), "pip install liger-kernel"),
    "11 seed -1": (CLASSES, sets("seed", -1), "seed must be from 0 to 2**32 - 1"),
    "11 seed 10**30": (CLASSES, sets("seed", 10**30), "seed must be from 0 to 2**32 - 1"),
    "12 an output that cannot be": (CLASSES, sets("output", "/dev/null/run"), "output: '/dev/null/run' cannot be"),
    "12 an output of 5000 letters": (CLASSES, sets("output", "o" * 5000), "cannot be written: File name too long"),
    "13 a file of 5000 letters": (CLASSES, sets("tasks.first.train", "t" * 5000 + ".csv"), "'first': no file ttt"),
    "15 lists as labels": (CLASSES, labelled(["a", "b"], ["a"], ["c"]), "one label a row is needed, and row 1 of"),
    "16 a text without a token": (CLASSES, empty_text, "of rows.jsonl and 4 more holds not one token"),
    "17 rows above the positions": (CLASSES, few_positions, "max_length=64 is above the 32 positions of the base"),
    "18 a base that is cut off": (CLASSES, cut, "It is truncated or damaged; copy or fetch it again"),
    "25 messages as a prompt": (
        TEXTS,
        generation("x.jsonl", *[{"messages": TALK, "answer": "was"}] * 4, prompt="messages"),
        "set kind: chat and messages: messages",
    ),
    "26 lists as text": (CLASSES, file("x.jsonl", lines(*[{"text": ["a"], "label": 1}] * 4)), "column 'text' must"),
    "26 dictionaries as text": (CLASSES, file("x.jsonl", lines(*[{"text": {}, "label": 1}] * 4)), "'text' must hold"),
    "26 lists as prompts": (TEXTS, generation("x.jsonl", *[{"prompt": ["a"], "answer": "b"}] * 4), "column 'prompt'"),
    "26 dictionaries as prompts": (TEXTS, generation("x.jsonl", *[{"prompt": {}, "answer": "b"}] * 4), "'prompt' must"),
    "28 two columns of one name": (
        CLASSES,
        file("x.csv", "text,label,label\nit,a,b\n"),
        "column 'label' is there twice",
    ),
    "30 alpha 0": (CLASSES, sets("recipe.alpha", 0), "alpha must be positive, got 0"),
    "30 alpha -4": (CLASSES, sets("recipe.alpha", -4), "alpha must be positive, got -4"),
    "31 alpha NaN": (CLASSES, sets("recipe.alpha", float("nan")), "alpha must be a finite number"),
    "32 balance -1": (CLASSES, sets("recipe.balance", -1.0), "balance must be at least 0, got -1.0"),
    "34 fp16 on a CPU": (CLASSES, training(fp16=True), "training.fp16 needs an accelerator"),
    "37 no epochs": (CLASSES, training(num_train_epochs=0), "num_train_epochs must be a positive number"),
    "38 max_length 10**9": (CLASSES, sets("max_length", 10**9), "max_length=1000000000 is above the 64 positions"),
    "42 a task with an empty name": (CLASSES, nameless, "a task has an empty name"),
    "43 a base with NaN": (CLASSES, poisoned, "encoder.layer.1.output.dense.weight of"),
    "47 a row without a label": (CLASSES, broken_rows, "row 8 of rows.jsonl has no value in column 'label'"),
    "48 a folder": (CLASSES, sets("tasks.first.train", "/tmp"), "/tmp is a folder: name its files"),
    "51 warmup_ratio": (CLASSES, training(warmup_ratio=0.1), "It is now warmup_steps"),
    "51 logging_dir": (
        CLASSES,
        training(logging_dir="a"),
        "It is now the environment variable TENSORBOARD_LOGGING_DIR",
    ),
    "51 evaluation_strategy": (CLASSES, training(evaluation_strategy="no"), "It is now eval_strategy"),
    "51 group_by_length": (CLASSES, training(group_by_length=True), "It is now train_sampling_strategy"),
    "52 3000 labels": (
        CLASSES,
        many_labels,
        "the labels are l0, l1, l10, l100, l1000, l1001, l1002, l1003 and 2992 more",
    ),
    "53 an answer without room": (TEXTS, generation("x.jsonl", *LONG), "the answers of 1 of 6 rows leave no room"),
}

WORDS = ("NA", "null", "None", "NaN")
ACCEPTED: dict[str, Case] = {
    "9 evaluation while training": (
        CLASSES,
        training(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True),
        "mixture",
    ),
    "14 a task called $a_$": (CLASSES, with_dollars, "$a_$"),
    **{
        f"27 {word} as a label": (
            CLASSES,
            file("x.csv", "text,label\n" + f"it,{word}\nso,b\n" * 8),
            "mine: 13 training",
        )
        for word in WORDS
    },
    "29 30 numbers as labels": (CLASSES, numbers, "30 classes, though this looks like a regression"),
    "33 rank 4096": (CLASSES, sets("recipe.rank", 4096), "note: the rank is above the size of 12 layers"),
    "35 label smoothing": (CLASSES, training(label_smoothing_factor=0.1), "own losses (balance, z) are left out"),
    "36 a learning rate of 10**6": (CLASSES, training(learning_rate=1e6), "is the learning rate of 1e+06 too high?"),
    "39 long prompts": (
        TEXTS,
        generation("x.jsonl", *[{"prompt": "it " * 40, "answer": "was"}] * 8),
        "6 of 6 training rows are longer than max_length=16 and were truncated",
    ),
    "40 empty answers": (
        TEXTS,
        generation("x.jsonl", *[{"prompt": "it", "answer": ""}] * 8),
        "6 of 6 training answers are empty: they teach the end token only",
    ),
    "41 evaluation rows that are training rows": (CLASSES, scored_on_itself, "first: eval is the file of train"),
    "48 a pattern": (CLASSES, a_pattern, "mine: 51 training rows"),
    "49 a packed CSV": (
        CLASSES,
        file("x.csv.gz", gzip.compress(b"text,label\n" + b"it,a\nso,b\n" * 8)),
        "mine: 13 train",
    ),
    "50 peft's r": (CLASSES, lambda home, v: v.update(recipe={"r": 3, "n_experts": 2}), "after training"),
    "53 an answer without room, skipped": (
        TEXTS,
        all_of(generation("x.jsonl", *LONG), sets("long_rows", "skip")),
        "1 of 6 training rows are longer than max_length=16 and were left out",
    ),
}
BYTES: dict[str, tuple[bytes, str]] = {
    "not UTF-8": (b"base: \xff", "a.yaml is not UTF-8 at byte 6"),
    "nested 3000 deep": (b"[" * 3000 + b"]" * 3000, "a.yaml is not usable YAML: it is nested too deep"),
    "a number of 5000 digits": (b"seed: " + b"9" * 5000, "a.yaml is not usable YAML: Exceeds the limit"),
}
