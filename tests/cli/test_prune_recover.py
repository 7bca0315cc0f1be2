"""`moa prune`, `moa train` on what it wrote, and `moa recover`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import moa
from moa.cli.main import main
from tests import models
from tests.tiny_run import config_values

IDS = torch.tensor([[3, 4, 5, 6]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_a_base_is_pruned_trained_on_and_recovered(bases: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    small, run, out = tmp_path / "small", tmp_path / "run", tmp_path / "out"
    assert main(["prune", str(bases["encoder"]), str(small), "--ratio", "0.5", "--layers", "-1"]) == 0
    assert "parameters are kept, 2 groups of layers pruned" in capsys.readouterr().out
    assert (small / "tokenizer.json").is_file()
    config = json.loads((small / "config.json").read_text())
    assert len(config["moa_pruned"]["encoder.layer.1"]["kept"]) == 12
    recipe = {"router": "dense", "n_experts": 2, "rank": 2, "targets": "all-linear"}
    values = config_values(tmp_path, small)
    values |= {"recipe": recipe, "training": {**values["training"], "max_steps": 2}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "config.yaml")]) == 0
    assert main(["recover", str(run), "--base", str(bases["encoder"]), str(out)]) == 0
    trained, recovered = moa.load(run / "model"), moa.load(out)
    assert recovered.base.encoder.encoder.layer[1].intermediate.dense.base.out_features == 24
    a, b = trained.adapter_state_dict(), recovered.adapter_state_dict()
    key = "base.encoder.encoder.layer.1.intermediate.dense.branches.0.bank.up"
    assert torch.equal(b[key][..., config["moa_pruned"]["encoder.layer.1"]["kept"]], a[key])


@pytest.fixture
def home(bases: dict[str, Path], tmp_path: Path) -> Path:
    """Return a folder with a mixture on a pruned Llama."""
    small = moa.prune(AutoModelForCausalLM.from_pretrained(bases["decoder"]), 0.5, [1])
    models.randomise(moa.build(small, "topk", n_experts=3, k=2, rank=2)).save_pretrained(tmp_path / "trained")
    return tmp_path


def test_recover_is_the_library_call(bases: dict[str, Path], home: Path, capsys: Any) -> None:
    full = str(bases["decoder"])
    words = ["recover", str(home / "trained"), "--base", full, str(home / "out")]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "recovers" in said and "on LlamaForCausalLM" in said and not (home / "out").exists()
    assert main([*words, "--fill", "normal", "--seed", "3"]) == 0
    expected = moa.recover(home / "trained", AutoModelForCausalLM.from_pretrained(full), fill="normal", seed=3)
    assert torch.equal(logits(moa.load(home / "out")), logits(expected))
    assert main(words) == 2 and "exists already" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(home / "trained")]) == 0 and ", pruned" in capsys.readouterr().out
    assert main(["inspect", str(home / "out")]) == 0 and ", pruned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recover", "{home}/trained", "--base", "{home}/none", "{home}/out"], "cannot be loaded"),
        (["recover", "{home}/none", "--base", "{full}", "{home}/out"], "none"),
        (["recover", "{home}/trained", "--base", "{full}", "{home}/out", "--fill", "ones"], "unknown fill 'ones'"),
        (["recover", "{home}/trained", "--base", "{full}", "{full}"], "the same or one holds the other"),
        (["prune", "{full}", "{home}/out", "--ratio", "0.5"], "the first 4 and last 2 stay whole unless layers"),
        (["prune", "{full}", "{home}/out", "--ratio", "1.5", "--layers", "1"], "from 0 to below 1"),
        (["prune", "{home}/none", "{home}/out", "--ratio", "0.5"], "cannot be loaded"),
    ],
)
def test_wrong_words_are_said_and_write_nothing(
    bases: dict[str, Path], home: Path, capsys: Any, words: list[str], said: str
) -> None:
    assert main([word.format(home=home, full=bases["decoder"]) for word in words]) == 2
    assert said in capsys.readouterr().err
    assert not (home / "out").exists()


def test_prune_writes_nothing_in_a_dry_run_and_a_pruned_base_is_not_pruned_again(
    bases: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    words = ["prune", str(bases["decoder"]), str(tmp_path / "small"), "--ratio", "0.5", "--layers", "0", "1"]
    assert main([*words, "--dry-run"]) == 0 and not (tmp_path / "small").exists()
    assert main(words) == 0
    assert main(["prune", str(tmp_path / "small"), str(tmp_path / "out"), "--ratio", "0.6", "--layers", "0"]) == 2
    assert "is pruned already" in capsys.readouterr().err
