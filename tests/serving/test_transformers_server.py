"""Checkpoints behind transformers' own server, as `moa serve` starts it where vLLM cannot. No clock, the loopback."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

import moa
from moa.cli.main import main
from moa.errors import ConfigError
from moa.runs import transformers_server
from moa.runs.transformers_server import serve
from moa.serving.vllm import registration
from tests import models
from tests.http_server import complete, free_port, running
from tests.tiny_run import decoder_folder
from tests.vllm_engine import ROOT

pytestmark = pytest.mark.skipif(not is_serve_available(), reason="no server: pip install 'transformers[serving]'")
NEW = 8


def checkpoint(folder: Path, **options: Any) -> tuple[Path, Any]:
    base = AutoModelForCausalLM.from_pretrained(decoder_folder(folder / "base"))
    model = models.randomise(moa.build(base, n_experts=3, rank=2, **options)).eval()
    model.save_pretrained(folder / "checkpoint")
    return folder / "checkpoint", model


def test_a_model_that_routes_by_sequence_answers_and_streams(tmp_path: Path) -> None:
    folder, model = checkpoint(tmp_path, router="remix", granularity="sequence")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    prompt = tokenizer.decode([5, 9, 7, 8])
    ids = tokenizer(prompt, return_tensors="pt")
    made = [m.generate(**ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False) for m in (model, model.base)]
    expected, plain = (tokenizer.decode(m[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) for m in made)
    assert expected != plain, "the mixture moves nothing"
    port = free_port()
    command = [sys.executable, "-m", "moa", "serve", str(folder), "--", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    wanted = {"prompt": prompt, "max_tokens": NEW, "temperature": 0}
    wanted["generation_config"] = json.dumps({"min_new_tokens": NEW, "do_sample": False})
    log = tmp_path / "log"
    with running(command, port, log, environment) as address:
        assert json.loads(complete(address, **wanted))["choices"][0]["text"] == expected
        lines = [line for line in complete(address, **wanted, stream=True).splitlines() if line]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
        assert len(pieces) > 2 and "".join(pieces) == expected
        with urllib.request.urlopen(f"{address}/v1/models", timeout=20) as answer:
            assert [row["id"] for row in json.loads(answer.read())["data"]] == [str(folder)]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            complete(address, **wanted, model="another")
    assert "transformers' own server" in log.read_text() and "since vLLM cannot serve it" in log.read_text()


def test_what_the_server_has_no_word_for_is_refused_before_it_starts(tmp_path: Path) -> None:
    by_task = moa.build(models.llama(), router="poly", n_tasks=2)
    with pytest.raises(ConfigError, match=r"no task for a request.*TableRouter.*peft-tasks"):
        serve("x", [], by_task, None)
    by_sequence = moa.build(models.llama(), router="remix", granularity="sequence")
    with pytest.raises(ConfigError, match=r"--continuous-batching is for routing of each row.*whole sequence"):
        serve("x", ["--continuous-batching"], by_sequence, None)
    with pytest.raises(ConfigError, match="--dtype is for a base that the server loads"):
        serve("x", ["--dtype", "float16"], by_sequence, None)


def test_the_engine_that_can_is_chosen_and_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    folder, _ = checkpoint(tmp_path, router="topk")
    started: list[str] = []
    monkeypatch.setattr(transformers_server, "serve", lambda name, options, model, tokenizer: started.append(name))
    assert main(["serve", str(folder)]) == 0
    assert started == [str(folder)] and "since vLLM is not installed" in capsys.readouterr().out
    monkeypatch.setattr(registration, "engine_version", lambda: "0.32.0")
    assert main(["serve", str(folder)]) == 2
    assert "vLLM is installed and can serve" in capsys.readouterr().err
    assert main(["serve", str(folder), "--engine", "transformers"]) == 0
    assert len(started) == 2 and "since --engine says so" in capsys.readouterr().out
    assert main(["serve", str(folder), "--dry-run", "--", "--port", "1"]) == 0
    assert capsys.readouterr().out == f"transformers serve {folder} --port 1 (with the mixture)\n"
    out = str(tmp_path / "exported")
    assert main(["export", str(folder), "--to", "vllm", out]) == 0
    assert main(["serve", out, "--engine", "transformers"]) == 2
    assert "give moa serve the checkpoint itself" in capsys.readouterr().err
    monkeypatch.setattr(registration, "engine_version", lambda: None)
    assert main(["serve", out]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err
    assert len(started) == 2
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    assert main(["serve", str(folder)]) == 2
    assert "pip install 'mixture-of-adapters[serve]'" in capsys.readouterr().err
