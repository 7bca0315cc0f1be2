"""Wrong inputs: exit 2, one line, nothing written. Run: pytest tests/cli/test_wrong_inputs.py"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa.cli.main import main
from moa.errors import LostLossWarning
from tests.tiny_run import assert_refused, config_values, encoder_folder, write_jsonl

Values = dict[str, Any]
Change = Callable[[Path, Values], None]


def sets(path: str, value: Any) -> Change:
    """Return a change of one key, a.b.c, of a configuration."""

    def change(home: Path, values: Values) -> None:
        *parents, last = path.split(".")
        for name in parents:
            values = values.setdefault(name, {})
        values[last] = value

    return change


def file(name: str, content: str | bytes, **task: Any) -> Change:
    """Return a change that trains on a file of its own."""

    def change(home: Path, values: Values) -> None:
        (home / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        values["tasks"] = {"mine": {"train": str(home / name), **task}}

    return change


def labelled(*labels: Any) -> Change:
    return file("rows.jsonl", "".join(json.dumps({"text": "it was", "label": label}) + "\n" for label in labels))


def cut(home: Path, values: Values) -> None:
    base = encoder_folder(home / "cut")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    values["base"] = str(base)


def poisoned(home: Path, values: Values) -> None:
    import torch
    from transformers import BertModel

    base = encoder_folder(home / "nan")
    model = BertModel.from_pretrained(base)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(base)
    values["base"] = str(base)


def empty_text(home: Path, values: Values) -> None:
    file("rows.jsonl", "".join(json.dumps({"text": " ", "label": i % 2}) + "\n" for i in range(6)))(home, values)


def broken_rows(home: Path, values: Values) -> None:
    data = [dict(text=f"it was {i}", label="ab"[i % 2]) for i in range(40)]
    data[7]["label"] = None  # type: ignore[assignment]
    values["tasks"] = {"mine": {"train": str(write_jsonl(home / "rows.jsonl", data))}}


TWO = "text,label\nit was,a\nso fine,b\n"
WRONG: dict[str, tuple[Change, str]] = {
    "a CSV file called parquet": (file("x.parquet", TWO), "x.parquet cannot be read as parquet"),
    "a short dtype": (sets("dtype", "fp16"), "unknown dtype 'fp16'. Did you mean 'float16'?"),
    "text as a number": (sets("training.learning_rate", "1e-3x"), "training.learning_rate must be a number"),
    "NaN": (sets("training.learning_rate", float("nan")), "must be a finite number"),
    "a negative rate": (sets("training.learning_rate", -0.001), "must be a positive number"),
    "steps in words": (sets("training.max_steps", "ten"), "max_steps must be a whole number"),
    "no steps": (sets("training.max_steps", None), "max_steps must be a whole number"),
    "no epochs": (sets("training.num_train_epochs", 0), "num_train_epochs must be a positive number"),
    "no batch": (sets("training.per_device_train_batch_size", 0), "at least 1, got 0"),
    "no accumulation": (sets("training.gradient_accumulation_steps", 0), "at least 1, got 0"),
    "a backend": (sets("training.torch_compile_backend", "nope"), "unknown backend 'nope'"),
    "fp16 on a CPU": (sets("training.fp16", True), "fp16 needs an accelerator"),
    "an old name": (sets("training.warmup_ratio", 0.1), "It is now warmup_steps"),
    "a name with a slip": (sets("training.learning_rat", 0.1), "Did you mean 'learning_rate'?"),
    "a package": (sets("training.report_to", "neptune"), "pip install neptune"),
    "a kernel package": (sets("training.use_liger_kernel", True), "pip install liger-kernel"),
    "a negative seed": (sets("seed", -1), "seed must be from 0 to 2**32 - 1"),
    "a huge seed": (sets("seed", 10**30), "seed must be from 0 to 2**32 - 1"),
    "an output that cannot be": (sets("output", "/dev/null/run"), "cannot be written"),
    "a long output": (sets("output", "o" * 5000), "cannot be written"),
    "a long name": (sets("tasks.first.train", "t" * 5000 + ".csv"), "no file ttt"),
    "a folder": (sets("tasks.first.train", "/tmp"), "/tmp is a folder: name its files"),
    "a pattern": (sets("tasks.first.train", "nothing/*.csv"), "no file fits the pattern"),
    "an absent name": (sets("tasks.first.train", "rows"), "for a data set of the hub set format: hub"),
    "an unknown path": (sets("tasks.first.train", "./nothing"), "no file ./nothing"),
    "a nameless task": (lambda home, v: v["tasks"].update({"": v["tasks"]["first"]}), "a task has an empty name"),
    "lists as labels": (labelled(["a", "b"], ["a"], ["c"]), "one label a row is needed, and row"),
    "fractions and words as labels": (labelled(*(i / 7 for i in range(8)), "good"), "('good' in row 9 of rows.jsonl)"),
    "words to regress": (sets("tasks.first.problem", "regression"), "and a regression needs a finite number there"),
    "a problem with a slip": (sets("tasks.first.problem", "regresion"), "Did you mean 'regression'?"),
    "regression as a kind": (sets("tasks.first.kind", "regression"), "kind: classification with problem: regression"),
    "classes of a regression": (
        lambda home, v: v["tasks"]["first"].update(problem="regression", labels=["a", "b"]),
        "labels lists classes, and a regression has none",
    ),
    "a column twice to regress": (sets("tasks.first.label", ["a", "a"]), "label names a column twice: a, a"),
    "a measure": (sets("training.metric_for_best_model", "rmse"), "unknown measure 'rmse'"),
    "texts without a token": (empty_text, "holds not one token"),
    "rows without a value": (broken_rows, "row 8 of rows.jsonl has no value in column 'label'"),
    "a column twice": (file("x.csv", "text,label,label\nit,a,b\n"), "the column 'label' is there twice"),
    "a row too wide": (file("x.csv", TWO + "it,was,so\n"), "row 3 has 3 values, and there are 2 columns"),
    "bytes that are no text": (file("x.csv", b"text,label\nit \xff,a\n"), "not UTF-8 at byte 14"),
    "half an object": (file("x.jsonl", '{"text": "it", "label": 1}\n{"text"\n'), "line 2: "),
    "no object": (file("x.json", "[1, 2]"), "row 1 holds a int, expected an object"),
    "positions": (sets("max_length", 65), "max_length=65 is above the 64 positions of the base: set at most 64"),
    "a base that is cut off": (cut, "is truncated or damaged"),
    "a base with NaN": (poisoned, "encoder.layer.1.output.dense.weight of"),
    "a base that is not there": (sets("base", "/nowhere/at/all"), "there is no folder /nowhere/at/all"),
    "no strength": (sets("recipe.alpha", 0), "alpha must be positive"),
    "a strength turned round": (sets("recipe.alpha", -4.0), "alpha must be positive"),
    "a strength that is no number": (sets("recipe.alpha", float("nan")), "alpha must be a finite number"),
    "a router": (sets("recipe.router", "tpok"), "unknown router 'tpok'. Did you mean 'topk'?"),
    "a keyword": (sets("recipe.rnak", 4), "unknown keyword 'rnak' in the recipe 'topk' with expert='lora'. Did you"),
    "a family": (sets("recipe.expert", "lroa"), "unknown expert family 'lroa'. Did you mean 'lora'?"),
    "a choice": (sets("recipe.start", "zro"), "unknown value 'zro' in recipe: start. Did you mean 'zero'?"),
    "more than there are": (sets("recipe.k", 9), "k must be at most n_experts, got k=9 with n_experts=4."),
    "experts without end": (
        sets("recipe.n_experts", 10**12),
        "GiB free: take fewer or smaller experts (n_exp",
    ),
    "a balance towards collapse": (sets("recipe.balance", -1.0), "balance must be at least 0"),
    "both spellings": (sets("recipe.r", 4), "rank is given twice"),
    "a module": (sets("import", "nothing_of_the_kind"), "nothing_of_the_kind cannot be imported"),
    "patience without evaluations": (
        lambda home, v: (sets("patience", 1)(home, v), sets("training.eval_strategy", "no")(home, v)),
        "leave one out",
    ),
}


def written(home: Path, values: Values) -> Path:
    path = home / "a.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("name", WRONG)
def test_training_refuses_in_one_line_and_writes_nothing(
    name: str, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG[name]
    values = config_values(tmp_path, bases["encoder"])
    change(tmp_path, values)
    config = written(tmp_path, values)
    assert_refused(config, message, capsys)
    assert_refused(config, message, capsys, "--dry-run")


CHATTED = [{"role": "user", "content": "it"}, {"role": "assistant", "content": "was"}]
WRONG_TEXT: dict[str, tuple[Change, str]] = {
    "a chat as a prompt": (
        file(
            "x.jsonl",
            (json.dumps({"messages": CHATTED}) + "\n") * 4,
            kind="generation",
            prompt="messages",
            answer="messages",
        ),
        "column 'messages' must hold text, and row",
    ),
    "a dictionary as an answer": (
        file("x.jsonl", (json.dumps({"prompt": "it", "answer": {"a": 1}}) + "\n") * 4, kind="generation"),
        "column 'answer' must hold text",
    ),
    "no template": (
        file("x.jsonl", (json.dumps({"messages": CHATTED}) + "\n") * 4, kind="chat"),
        "has no chat template",
    ),
    "answers without room": (
        file("x.jsonl", (json.dumps({"prompt": "it", "answer": "was " * 40}) + "\n") * 4, kind="generation"),
        "long_rows: skip",
    ),
    "long rows where they are refused": (
        lambda home, v: (
            file("x.jsonl", (json.dumps({"prompt": "it " * 40, "answer": "was"}) + "\n") * 4, kind="generation")(
                home, v
            ),
            sets("long_rows", "refuse")(home, v),
        ),
        "rows are longer than max_length=16, first row",
    ),
}


@pytest.mark.parametrize("name", WRONG_TEXT)
def test_generation_refuses_in_one_line_and_writes_nothing(
    name: str, tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = WRONG_TEXT[name]
    values = config_values(tmp_path, bases["decoder"], "generation")
    change(tmp_path, values)
    config = written(tmp_path, values)
    assert_refused(config, message, capsys)
    assert_refused(config, message, capsys, "--dry-run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"base: \xff", "is not UTF-8 at byte 6"),
        (b"[" * 3000 + b"]" * 3000, "is nested too deep"),
        (b"seed: " + b"9" * 5000, "is not usable YAML"),
        (b"base: [", "is not YAML"),
        (b"- a", "must hold key: value lines"),
    ],
)
@pytest.mark.parametrize("command", ["train", "merge"])
def test_files_that_are_no_configuration(
    tmp_path: Path, command: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    assert main([command, str(tmp_path / "a.yaml")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_what_is_refused_costs_no_heavy_import(tmp_path: Path) -> None:
    """Every refusal that needs no model comes before torch and transformers."""
    late = {"a backend", "fp16 on a CPU", "a base with NaN", "texts without a token", "patience without evaluations"}
    late |= {"a module", "experts without end"}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64}))
    configs = {}
    for number, (name, (change, _)) in enumerate(WRONG.items()):
        if name in late or change is cut:
            continue
        home = tmp_path / str(number)
        home.mkdir()
        values = config_values(home, base)
        change(home, values)
        configs[name] = str(written(home, values))
    script = (
        "import json, sys\nfrom moa.cli.main import main\n"
        "for name, path in json.load(sys.stdin).items():\n"
        "    assert main(['train', path]) == 2, name\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(configs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(configs) > 30 and len(done.stderr.splitlines()) == len(configs)


def test_what_is_doubtful_is_said(tmp_path: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Accepted, and said before training starts."""
    values = config_values(tmp_path, bases["encoder"])
    train = write_jsonl(tmp_path / "many.jsonl", [{"text": "it was " * 20, "label": i} for i in range(30)])
    values["tasks"] = {"mine": {"train": str(train), "eval": str(train)}}
    values["recipe"] |= {"rank": 4096, "n_experts": 2}
    values["training"] |= {"label_smoothing_factor": 0.1, "max_steps": 1, "learning_rate": 1e6}
    with pytest.warns(LostLossWarning, match="routed_loss"):  # label smoothing computes the loss by itself
        assert main(["train", str(written(tmp_path, values))]) == 0
    said = capsys.readouterr().out
    for part in (
        "mine: eval is the file of train",
        "30 different numbers (0, 1, 2 and 27 more): trained as 30 classes, though this looks like a regression: "
        "then set problem: regression",
        "mine: 30 of 30 training rows are longer than max_length=16 and were truncated",
        "the rank is above the size of",
        "the routers' own losses (balance, z) are left out",
        "is the learning rate of 1e+06 too high?",
    ):
        assert part in said, part


def test_words_are_read_as_they_are_written(tmp_path: Path, bases: dict[str, Path]) -> None:
    from moa.runs.config import parse
    from moa.runs.task_rows import read_tasks

    words = ["NA", "null", "None", "nan", "01", "1"]
    values = config_values(tmp_path, bases["encoder"])
    file("x.csv", "text,label\n" + "".join(f"it,{word}\n" for word in words * 3))(tmp_path, values)
    (got,) = read_tasks(parse(values).tasks)
    assert sorted(got.labels) == sorted(words)
    import gzip

    file("x.csv.gz", gzip.compress(b"text,label\n" + b"it,a\nso,b\n" * 3))(tmp_path, values)
    (got,) = read_tasks(parse(values).tasks)
    assert got.labels == ["a", "b"] and len(got.train) + len(got.eval) == 6
