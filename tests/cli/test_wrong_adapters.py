"""Adapters and options of `moa merge` that are wrong. Run: pytest tests/cli/test_wrong_adapters.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moa
from moa.cli.main import main
from moa.errors import MoaWarning
from tests import models

CONFIG = "adapter_config.json"


@pytest.fixture
def adapters(tmp_path: Path) -> tuple[Path, Path]:
    """Return the folders of two LoRA adapters of one base."""
    model = moa.build(models.llama(), "fixed", n_experts=2, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bank.up"):
                torch.nn.init.normal_(parameter)
    folders = tmp_path / "a", tmp_path / "b"
    for expert, folder in enumerate(folders):
        moa.export_expert(model, expert, folder)
    return folders


def changed(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_rslora": "no"}, "use_rslora='no': expected true or false"),
        ({"use_rslora": 1}, "use_rslora=1: expected true or false"),
        ({"use_dora": "false"}, "use_dora='false': expected true or false"),
        ({"fan_in_fan_out": "no"}, "fan_in_fan_out='no': expected true or false"),
        ({"lora_bias": "no"}, "lora_bias='no': expected true or false"),
        ({"use_bdlora": "no"}, "use_bdlora='no': expected an object"),
        ({"kasa_config": True}, "kasa_config=True: expected an object"),
        ({"rank_pattern": "("}, "rank_pattern='(': expected an object"),
        ({"alpha_pattern": {".*": None}}, "alpha_pattern['.*']=None: expected a finite number"),
        ({"target_modules": 3}, "a: adapter_config.json has target_modules=3: expected a name or a list of names"),
        ({"target_modules": ["q_proj", 3]}, "target_modules=['q_proj', 3]: expected a name or a list of names"),
        ({"task_type": 5}, "task_type=5: expected text"),
        ({"lora_dropout": "x"}, "lora_dropout='x': expected a number"),
        ({"layers_to_transform": "x"}, "layers_to_transform='x': expected a number or a list of numbers"),
        ({"inference_mode": "x"}, "inference_mode='x': expected true or false"),
        ({"lora_alpha": -16}, "a: adapter_config.json has lora_alpha=-16: expected a finite number, at least 0"),
        ({"lora_alpha": True}, "lora_alpha=True: expected a finite number, at least 0"),
        ({"lora_alpha": 10**400}, "expected a finite number, at least 0"),
        ({"alpha_pattern": {".*": -1}}, "alpha_pattern['.*']=-1: expected a finite number, at least 0"),
        ({"r": 0}, "a: adapter_config.json has r=0: expected a whole number"),
        ({"r": 10**8}, "its config says 100000000 (r or rank_pattern)"),
        ({"alpha_pattern": {"(": 1}}, "the pattern '(' is no regular expression"),
        ({"peft_type": ["LORA"]}, "peft_type=['LORA']: expected text"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3: expected text"),
        ({"modules_to_save": "head"}, "modules_to_save='head': expected a list of names"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights=['x']: expected true, false or a name"),
        ({"bias": "yes"}, "bias='yes': expected none, all, lora_only"),
    ],
)
def test_values_of_another_type(
    adapters: tuple[Path, Path], values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = adapters
    changed(first, **values)
    assert main(["merge", str(first), str(second), "--out", str(first.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (first.parent / "out").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r": ' + "9" * 5000 + "}", "{", "[]"])
def test_configurations_that_are_no_object(
    adapters: tuple[Path, Path], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = adapters
    (first / CONFIG).write_text(text)
    assert main(["merge", str(first), str(second), "--out", str(first.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert CONFIG in error and len(error.splitlines()) == 1


def test_an_alpha_of_zero_is_said(adapters: tuple[Path, Path]) -> None:
    first, second = adapters
    changed(first, lora_alpha=0)
    with pytest.warns(MoaWarning, match="lora_alpha=0: what it scales counts for nothing"):
        assert main(["merge", str(first), str(second), "--out", str(first.parent / "out")]) == 0


def test_weights_of_zero_are_said(adapters: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = map(str, adapters)
    words = ["merge", first, second, "--out", str(adapters[0].parent / "out"), "--method", "task_arithmetic"]
    assert main([*words, "--weights", "0", "0"]) == 0
    assert "all weights are 0: the merged adapter does nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("scale=abc", "scale must be a number, got 'abc'"),
        ("scale=.inf", "scale must be a finite number"),
        ("density=no", "density must be a number, got 'no'"),
    ],
)
def test_options_that_are_no_numbers(
    adapters: tuple[Path, Path], option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = map(str, adapters)
    method = "ties" if option.startswith("density") else "task_arithmetic"
    assert main(["merge", first, second, "--out", "out", "--method", method, "--set", option]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_an_input_is_never_the_output(adapters: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Under its own name, through a link, around it or inside it."""
    first, second = adapters
    before = (first / "adapter_model.safetensors").read_bytes()
    link = first.parent.parent / f"{first.parent.name}-link"
    link.symlink_to(first.parent)
    for out in (first, link / "a", first.parent, first / "inside"):
        assert main(["merge", str(first), str(second), "--out", str(out), "--overwrite"]) == 2
        assert "same or one holds the other" in capsys.readouterr().err
    assert (first / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("entry", ["", 5, None, ["a"], ".", "\ud800.safetensors", "a\0b", "../a", "/a"])
def test_entries_of_an_index_that_are_no_files(tmp_path: Path, entry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    models.llama().save_pretrained(base)
    models.llama().save_pretrained(tuned, max_shard_size="5KB")
    index = next(tuned.glob("*.index.json"))
    values = json.loads(index.read_text())
    name = min(values["weight_map"])
    values["weight_map"][name] = entry
    index.write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["merge", str(tuned), "--base", str(base), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    if entry == "\ud800.safetensors":  # half a surrogate pair is not text: the whole file is refused
        assert index.name in error and "surrogates not allowed" in error
    else:
        assert repr(name) in error and repr(entry) in error
