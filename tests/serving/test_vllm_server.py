"""vLLM's OpenAI-compatible server on an exported mixture, as `moa serve` starts it. Run: make test-vllm"""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moa
from moa.serving.vllm.vllm_folder import export_vllm
from tests.http_server import complete, free_port, running
from tests.vllm_engine import NEEDS_ENGINE, PYTHON, engine_environment

from .test_vllm_plugin import base, trained

pytestmark = NEEDS_ENGINE
NEW = 8


def words(folder: Path) -> None:
    """Save a tokenizer whose token n is the word "wn"."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def server(folder: Path, log: Path):
    """Run `moa serve` until the block ends; its address."""
    port = free_port()
    options = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    options += ["--max-model-len", "128", "--gpu-memory-utilization", "0.1", "--served-model-name", "mixture"]
    command = [str(PYTHON), "-m", "moa", "serve", str(folder), "--", *options]
    return running(command, port, log, engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


def ask(address: str, **values: object) -> str:
    asked = {"model": "mixture", "temperature": 0, "max_tokens": NEW, "ignore_eos": True, "skip_special_tokens": False}
    return complete(address, **asked, **values)


def test_the_server_answers_streams_and_shows_the_load_of_every_layer(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    model = trained(moa.build(base(folder), router="topk", n_experts=4, targets="all-linear"))
    words(folder)
    prompt = torch.tensor([[5, 9, 77, 23, 4]])
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False)
    expected = " ".join(f"w{n}" for n in made[0, 5:].tolist())
    exported = export_vllm(model, tmp_path / "out")
    text = " ".join(f"w{n}" for n in prompt[0].tolist())
    with server(exported, tmp_path / "log") as address:
        assert json.loads(ask(address, prompt=text))["choices"][0]["text"].strip() == expected
        lines = [line.removeprefix("data: ") for line in ask(address, prompt=text, stream=True).splitlines() if line]
        assert lines[-1] == "[DONE]"
        pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
        assert len(pieces) > 1
        assert "".join(pieces).strip() == expected
        time.sleep(2.5)  # the load is published once a second
        with urllib.request.urlopen(f"{address}/metrics", timeout=20) as answer:
            metrics = answer.read().decode()
    found = re.findall(r'moa_routing_rows_total\{expert="(\d)",layer="([^"]+)"\} (\d+)', metrics)
    rows: dict[str, int] = {}
    for _, layer, count in found:
        rows[layer] = rows.get(layer, 0) + int(count)
    assert set(rows) == {name for name in model.mixtures()}
    assert all(count >= 2 for count in rows.values()), rows  # k = 2 of at least one row
