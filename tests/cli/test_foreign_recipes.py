"""Recipes of other packages: a checkpoint says what to import. Run: pytest tests/cli/test_foreign_recipes.py"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import moa
from moa.cli.main import main, parser
from moa.errors import BackendError, ConfigError
from moa.model.build import load
from moa.recipes import RECIPES
from moa.runs.config import import_module
from moa.serving.vllm.registration import IMPORTS, import_asked
from tests import models
from tests.tiny_run import config_values, decoder_folder, rows, write_jsonl

SOURCE = """
from dataclasses import dataclass

from moa.recipes import Recipe, register_recipe
from moa.recipes.gates import Fixed


@register_recipe("my_fixed")
@dataclass(frozen=True, kw_only=True)
class MyRecipe(Fixed):
    \"\"\"As fixed.\"\"\"
"""
MODULE = "my_recipe_of_tests"
MESSAGE = f"recipe 'my_fixed' comes from module {MODULE}; import it first (--import {MODULE}, or the path of its .py "


def forget() -> None:
    """Leave the tables as in a process that has imported nothing."""
    RECIPES.pop("my_fixed", None)
    sys.modules.pop(MODULE, None)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """Return a folder with a module, and a run whose recipe it registers; the module is not imported."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    import_module(str(tmp_path / f"{MODULE}.py"))
    base = AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path / "base"))
    models.randomise(moa.build(base, "my_fixed", n_experts=2, rank=2)).save_pretrained(tmp_path / "run" / "model")
    values = config_values(tmp_path, tmp_path / "base", "generation") | {"recipe": {"router": "topk"}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    forget()
    yield tmp_path
    forget()


def test_loading_says_which_module_to_import(home: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(home / "run" / "model")
    assert MESSAGE in str(caught.value) and str(home / "run" / "model") in str(caught.value)
    import_module(str(home / f"{MODULE}.py"))
    model = load(home / "run" / "model")
    assert model.describe()["origins"] == {"my_fixed": MODULE}
    plain = moa.build(models.llama(), "topk", n_experts=2, rank=2)
    assert plain.describe()["origins"] == {}


def commands(home: Path) -> dict[str, list[str]]:
    run, data = str(home / "run"), str(write_jsonl(home / "new.jsonl", rows(2, 0)))
    return {
        "fold": ["fold", run, f"{home}/out", "--dry-run"],
        "distill": ["distill", run, f"{home}/out", "--rank", "2", "--dry-run"],
        "export": ["export", run, f"{home}/out", "--dry-run"],
        "eval": ["eval", run],
        "generate": ["generate", run, "--prompts", data, "--column", "text", "--task", "0", "--max-new-tokens", "1"],
    }


@pytest.mark.parametrize("name", ["fold", "distill", "export", "eval", "generate"])
def test_every_command_that_loads_says_so_and_takes_import(
    home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = commands(home)[name]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert MESSAGE in error and "Traceback" not in error
    assert main([*words, "--import", str(home / f"{MODULE}.py")]) == 0


def test_inspecting_needs_no_module(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(home / "run")]) == 0
    assert "recipe my_fixed" in capsys.readouterr().out


NAMES = ("fold", "distill", "export", "eval", "predict", "generate", "merge", "inspect", "serve", "recipes")


@pytest.mark.parametrize("name", NAMES)
def test_the_option_is_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([name, "--help"])
    assert "--import MODULE" in capsys.readouterr().out


def test_what_cannot_be_imported_is_one_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(home / "run"), "--import", "nothing_of_this_name"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("moa inspect: import: nothing_of_this_name cannot be imported") and error.count("\n") == 1


def test_serving_hands_modules_to_the_engine(home: Path, monkeypatch: Any, capsys: Any) -> None:
    folder = home / "exported"
    folder.mkdir()
    moa_part = {"recipes": [], "origins": {"my_fixed": MODULE}}
    (folder / "config.json").write_text(json.dumps({"base_config": {}, "moa": moa_part}))
    (folder / "mixtures.safetensors").write_bytes(b"")
    from moa.serving.vllm import registration, vllm_folder

    (folder / vllm_folder.MIXTURES).write_bytes(b"")
    assert main(["serve", str(folder), "--dry-run"]) == 2
    assert MESSAGE in capsys.readouterr().err
    started: list[str] = []
    monkeypatch.setattr(registration, "engine_version", lambda: "0.32.0")
    monkeypatch.setattr(os, "execv", lambda program, words: started.extend(words))
    monkeypatch.setenv(IMPORTS, "")
    file = home / f"{MODULE}.py"
    assert main(["serve", str(folder), "--import", str(file)]) == 0
    assert str(folder) in started and os.environ[IMPORTS] == str(file.resolve())
    forget()
    monkeypatch.setattr(sys, "path", list(sys.path))
    import_asked()
    assert "my_fixed" in RECIPES
    monkeypatch.setenv(IMPORTS, "nothing_of_this_name")
    with pytest.raises(BackendError, match="--import nothing_of_this_name: No module named"):
        import_asked()


def test_what_is_fixed_is_what_was_saved(home: Path) -> None:
    import_module(str(home / f"{MODULE}.py"))
    one, ids = load(home / "run" / "model"), torch.tensor([[3, 4, 5]])
    one.save_pretrained(home / "again")
    torch.testing.assert_close(load(home / "again")(input_ids=ids).logits, one(input_ids=ids).logits, rtol=0, atol=0)
