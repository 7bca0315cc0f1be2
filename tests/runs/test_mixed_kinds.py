"""Texts, prompts and chats in one run; what cannot go together. Run: pytest tests/runs/test_mixed_kinds.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moa.cli.main import main
from moa.errors import ConfigError
from moa.model.build import load
from moa.runs.encode import encode_tasks
from moa.runs.tasks import Task
from tests.tiny_run import VOCAB, config_values, decoder_folder, rows, tokenizer, write_jsonl

from .test_chat import PLAIN

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


def encode(folder: Path, texts: list[Any], max_length: int = 16, **options: Any) -> Any:
    file = str(write_jsonl(folder / "texts.jsonl", [{"text": text} for text in texts]))
    return encode_tasks({"mine": Task(kind="text", train=file, eval=file)}, tokenizer(), max_length, **options)[0]


def words(ids: list[int]) -> str:
    return " ".join(VOCAB[i] for i in ids)


def test_every_token_of_a_text_is_learned_and_its_end(tmp_path: Path) -> None:
    made = encode(tmp_path, ["the film was good", "it [EOS]"])
    assert [words(row["input_ids"]) for row in made.train] == ["the film was good [EOS]", "it [EOS]"]
    assert made.train["labels"] == made.train["input_ids"]
    assert made.writes and made.prompts == [] and made.labels == []


def test_long_texts_lose_their_end_and_that_is_said(tmp_path: Path) -> None:
    made = encode(tmp_path, ["the film was good", "it was"], 3)
    assert [words(row["input_ids"]) for row in made.train] == ["the film was", "it was [EOS]"]
    assert "mine: 1 of 2 training rows are longer than max_length=3 and were truncated." in made.notes
    assert len(encode(tmp_path, ["the film was good", "it was"], 3, long_rows="skip").train) == 1
    with pytest.raises(ConfigError, match=r"first row 1 of texts.jsonl with 5 tokens: raise max_length"):
        encode(tmp_path, ["the film was good", "it was"], 3, long_rows="refuse")


def test_texts_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"row 2 of texts.jsonl holds not one token"):
        encode(tmp_path, ["it was", " "])
    with pytest.raises(ConfigError, match=r"column 'text' must hold text, and row 1 of texts.jsonl has a list"):
        encode(tmp_path, [["it was"]])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of three kinds of text to write on one language model."""
    home = tmp_path_factory.mktemp("kinds")
    base = decoder_folder(home / "base")
    tok = tokenizer()
    tok.chat_template = PLAIN
    tok.save_pretrained(base)
    values = config_values(home, base, "generation")
    for part in ("train", "eval"):
        n = 16 if part == "train" else 6
        turns = [
            [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]
            for row in rows(n, 4)
        ]
        write_jsonl(home / f"chat.{part}.jsonl", [{"messages": turn} for turn in turns])
        write_jsonl(home / f"text.{part}.jsonl", [{"text": row["text"]} for row in rows(n, 5)])
    for kind in ("chat", "text"):
        values["tasks"][kind] = {"kind": kind, **{p: str(home / f"{kind}.{p}.jsonl") for p in ("train", "eval")}}
    del values["tasks"]["second"]
    values["recipe"] = {"router": "moelora", "n_tasks": 3, "n_experts": 2, "rank": 2}
    values["generate"] = {"rows": 1, "max_new_tokens": 2}
    values["training"] |= {"learning_rate": 3e-2, "eval_strategy": "epoch"}
    (home / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    assert main(["train", str(home / "config.yaml")]) == 0
    return home / "run"


def test_texts_prompts_and_chats_train_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.loads((run / "results.json").read_text())
    assert {name: row["kind"] for name, row in results["tasks"].items()} == {
        "first": "generation",
        "chat": "chat",
        "text": "text",
    }
    before, after = results["scores"]["before"], results["scores"]["mixture"]
    for task in ("first", "chat", "text"):
        assert after[task]["loss"] < before[task]["loss"]
    assert "accuracy" in after["chat"] and set(after["text"]) == {"loss", "loss_error"}
    assert [row["task"] for row in results["answers"]] == ["first", "chat"]
    model = load(run / "model").eval()
    losses, counts = 0.0, 0  # the score of a text is the mean over its tokens, each row by itself
    for row in [json.loads(line) for line in (run.parent / "text.eval.jsonl").read_text().splitlines()]:
        ids = torch.tensor([[*tokenizer()(row["text"])["input_ids"], 2]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids, task_ids=torch.tensor([2])).loss
        losses, counts = losses + float(loss) * (ids.shape[1] - 1), counts + ids.shape[1] - 1
    assert after["text"]["loss"] == pytest.approx(losses / counts, rel=1e-5)
    assert main(["generate", str(run), "--prompt", "the film", "--task", "text", "--max-new-tokens", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_labels_and_texts_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config_values(tmp_path, decoder_folder(tmp_path / "base"))
    values["tasks"]["second"] |= {"kind": "text"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    error = capsys.readouterr().err
    assert "got first: classification, second: text. Make two runs of them." in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
