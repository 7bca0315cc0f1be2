"""`moa predict`, `moa generate`: what the model gives in Python. Run: pytest tests/cli/test_predict_generate.py"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import moa
from moa.cli.main import main
from moa.model.heads import MultiTaskForSequenceClassification
from tests import models
from tests.tiny_run import config_values, decoder_folder, encoder_folder, rows, tokenizer, write_jsonl

LABELS = {"first": ["negative", "positive"], "second": ["a", "b", "c"]}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run as `moa train` leaves it: config.yaml, and a mixture with two heads under model/."""
    home = tmp_path_factory.mktemp("classifier")
    base = encoder_folder(home / "base")
    model = moa.build(MultiTaskForSequenceClassification.from_encoder(base, LABELS), "topk", n_experts=4, k=2, rank=2)
    models.randomise(model).save_pretrained(home / "run" / "model")
    tokenizer().save_pretrained(home / "run" / "model")
    (home / "run" / "config.yaml").write_text(yaml.safe_dump(config_values(home, base)))
    return home / "run"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on a decoder whose routing is by task."""
    home = tmp_path_factory.mktemp("writer")
    base = decoder_folder(home / "base")
    built = moa.build(AutoModelForCausalLM.from_pretrained(base), "moelora", n_experts=4, rank=2, n_tasks=2)
    models.randomise(built).save_pretrained(home / "run" / "model")
    (home / "run" / "config.yaml").write_text(yaml.safe_dump(config_values(home, base, "generation")))
    return home / "run"


def expected(model: Any, texts: list[str], **kwargs: Any) -> list[list[float]]:
    """Return softmax(logits) of texts, one at a time."""
    out = []
    for text in texts:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            out.append(model(input_ids=ids, **kwargs).logits.softmax(-1)[0].tolist())
    return out


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("task", [0, 1])
def test_predictions_are_the_models(classifier: Path, tmp_path: Path, ending: str, task: int) -> None:
    name = list(LABELS)[task]
    data = [{"text": row["text"]} for row in rows(7, 3)]
    file = write_jsonl(tmp_path / "new.jsonl", data)
    out = tmp_path / f"out.{ending}"
    words = ["predict", str(classifier), "--data", str(file), "--out", str(out), "--batch-size", "3"]
    assert main([*words, "--task", [name, str(task)][task]]) == 0
    want = expected(moa.load(classifier / "model"), [r["text"] for r in data], task_ids=torch.tensor([task]))
    if ending == "jsonl":
        got = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        got = []
        for row in csv.DictReader(out.read_text().splitlines()):
            shares = {n: float(row[f"probabilities.{n}"]) for n in LABELS[name]}
            got.append({"row": int(row["row"]), "label": row["label"], "probabilities": shares})
    assert [row["row"] for row in got] == list(range(1, 8))
    for row, shares in zip(got, want, strict=True):
        assert list(row["probabilities"]) == LABELS[name]
        assert list(row["probabilities"].values()) == pytest.approx(shares[: len(LABELS[name])], abs=1e-5)
        assert row["label"] == LABELS[name][max(range(len(LABELS[name])), key=shares.__getitem__)]


def test_a_classifier_of_transformers_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run beside it: labels are the base's, the columns are named, long rows are said."""
    base = encoder_folder(tmp_path / "base")
    labels = {0: "no", 1: "maybe", 2: "yes"}
    plain = AutoModelForSequenceClassification.from_pretrained(base, id2label=labels, num_labels=3)
    models.randomise(moa.build(plain, "topk", n_experts=4, k=2, rank=2)).save_pretrained(tmp_path / "saved")
    data = [{"a": "good film", "b": "so it was", "label": None}, {"a": "bad plot " * 9, "b": "it is", "label": None}]
    file = write_jsonl(tmp_path / "new.jsonl", data)
    words = ["predict", str(tmp_path / "saved"), "--data", str(file), "--out", str(tmp_path / "out.jsonl")]
    assert main([*words, "--text", "a", "--max-length", "8"]) == 0
    assert "1 of 2 rows are longer than 8 tokens and were truncated" in capsys.readouterr().out
    got = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    want = expected(moa.load(tmp_path / "saved"), ["good film", "bad plot bad plot bad plot bad plot"])
    for row, shares in zip(got, want, strict=True):
        assert list(row["probabilities"]) == list(labels.values())
        assert list(row["probabilities"].values()) == pytest.approx(shares, abs=1e-5)


def generated(model: Any, text: str, **kwargs: Any) -> str:
    """Return what a model writes after one text in six tokens."""
    words = tokenizer()
    ids = torch.tensor([words(text)["input_ids"]])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, **kwargs)
    return words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("task", [0, 1])
def test_what_is_generated_is_the_models(
    writer: Path, tmp_path: Path, task: int, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moa.load(writer / "model")
    prompts = ["the film was so good", "it is", "poor plot"]
    ids = torch.tensor([task])
    framed = [generated(model, f"review {p} label:", task_ids=ids, do_sample=False) for p in prompts]
    assert len(set(framed)) > 1
    few = ["--max-new-tokens", "6", "--task", ["first", "1"][task]]
    assert main(["generate", str(writer), "--prompt", prompts[0], *few]) == 0
    assert capsys.readouterr().out == framed[0] + "\n"
    assert main(["generate", str(writer), "--prompt", prompts[0], "--raw", *few]) == 0
    assert capsys.readouterr().out == generated(model, prompts[0], task_ids=ids, do_sample=False) + "\n"
    (tmp_path / "p.txt").write_text(f"{prompts[0]}\n\n{prompts[1]}\n{prompts[2]}\n")
    assert main(["generate", str(writer), "--prompts", str(tmp_path / "p.txt"), "--batch-size", "2", *few]) == 0
    got = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    places = [1, 3, 4]
    assert got == [{"row": n, "prompt": p, "generated": f} for n, p, f in zip(places, prompts, framed, strict=True)]
    table = write_jsonl(tmp_path / "p.jsonl", [{"text": p} for p in prompts])
    out = tmp_path / "out.jsonl"
    assert main(["generate", str(writer), "--prompts", str(table), "--out", str(out), *few]) == 0
    assert [json.loads(line)["generated"] for line in out.read_text().splitlines()] == framed


def test_what_is_drawn_is_what_the_seed_says(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import set_seed

    model = moa.load(writer / "model")
    words = ["generate", str(writer), "--prompt", "it is", "--raw", "--task", "0", "--max-new-tokens", "6"]
    seen = set()
    for seed in (1, 2, 3):
        set_seed(seed)
        options = {"do_sample": True, "temperature": 2.0, "top_p": 0.9, "top_k": 0}
        want = generated(model, "it is", task_ids=torch.tensor([0]), **options)
        assert main([*words, "--temperature", "2", "--top-p", "0.9", "--seed", str(seed)]) == 0
        assert capsys.readouterr().out == want + "\n"
        seen.add(want)
    assert len(seen) > 1


def test_what_cannot_be_is_one_line_and_writes_nothing(
    classifier: Path, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = str(write_jsonl(tmp_path / "new.jsonl", [{"text": "it was", "other": "so"}, {"text": None, "other": "it"}]))
    good = str(write_jsonl(tmp_path / "good.jsonl", [{"text": "it was"}]))
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    out, run = str(tmp_path / "out.jsonl"), str(classifier)
    predict, generate = ["predict", run, "--data"], ["generate", str(writer), "--prompt", "it"]
    by_task = ["--task", "first"]
    cases = [
        ([*predict, good, "--out", out], "has the tasks first, second: choose one with --task"),
        ([*predict, good, "--out", out, "--task", "frist"], "Did you mean 'first'?"),
        ([*predict, good, "--out", out, "--task", "2"], "unknown task '2'"),
        ([*predict, new, "--out", out, *by_task], "row 2 of new.jsonl has no value in column 'text'"),
        ([*predict, new, "--out", out, *by_task, "--text", "words"], "no column 'words'; there are 'text', 'other'"),
        ([*predict, f"{tmp_path}/nothing.csv", "--out", out, *by_task], "nothing.csv"),
        ([*predict, good, "--out", f"{tmp_path}/out.xlsx", *by_task], "must end in one of .jsonl, .csv, .tsv"),
        ([*predict, good, "--out", f"{tmp_path}/there.csv", *by_task], "exists already"),
        ([*predict, good, "--out", "/dev/null/x.csv", *by_task], "/dev/null is a file"),
        ([*predict, good, "--out", out, *by_task, "--batch-size", "0"], "--batch-size 0"),
        (["predict", f"{tmp_path}/none", "--data", good, "--out", out], "there is no folder"),
        (["predict", str(writer), "--data", good, "--out", out, "--task", "0"], "use moa generate"),
        (["predict", str(writer / "model"), "--data", good, "--out", out, "--task", "0"], "use moa generate"),
        (["generate", run, "--prompt", "it", "--task", "0"], "use moa predict"),
        (["generate", run, "--prompt", "it", "--task", "0", "--raw"], "which does not generate text"),
        (generate, "choose one with --task"),
        ([*generate, *by_task, "--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        ([*generate, *by_task, "--top-p", "0"], "--top-p must be above 0"),
        ([*generate, *by_task, "--top-p", "0.5"], "set --temperature above 0"),
        ([*generate, *by_task, "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        ([*generate[:3], " ", "--raw", *by_task], "holds not one token"),
        (["generate", str(writer), "--prompts", f"{tmp_path}/empty.txt", *by_task], "has no prompts"),
        (["generate", str(writer), "--prompts", good, *by_task, "--column", "p"], "no column 'p'; there are 'text'"),
    ]
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    for words, message in cases:
        assert main(words) == 2, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"moa {words[0]}: ") and message in error, (words, error)
        assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "there.csv").read_text() == "mine"
