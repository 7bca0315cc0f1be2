"""`moa merge` with recipes, `moa fold`, `moa distill`, `moa export`. Run: pytest tests/cli/test_commands.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moa
from moa.cli.main import main
from moa.merge import read_peft
from tests import models
from tests.laws import assert_close
from tests.tiny_run import config_values, decoder_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder with a base, a static mixture `fixed`, a routed one `topk`, and two experts as adapters."""
    folder = decoder_folder(tmp_path / "base")
    for router in ("fixed", "topk"):
        base = AutoModelForCausalLM.from_pretrained(folder)
        model = models.randomise(moa.build(base, router, n_experts=2, rank=2, targets=["q_proj", "down_proj"]))
        model.save_pretrained(tmp_path / router)
    assert main(["export", str(tmp_path / "fixed"), str(tmp_path / "experts")]) == 0
    return tmp_path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def recipe(home: Path, **changes: Any) -> Path:
    """Write a merge of both experts and return its file."""
    values = {
        "adapters": [{"path": str(home / "experts" / f"expert_{e}"), "weight": w} for e, w in enumerate((0.25, 0.75))],
        "method": "task_arithmetic",
        "options": {"scale": 2.0},
        "out": str(home / "merged"),
        **changes,
    }
    file = home / "recipe.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_recipe_is_what_it_says(home: Path) -> None:
    assert main(["merge", str(recipe(home))]) == 0
    parts = [read_peft(home / "experts" / f"expert_{e}") for e in (0, 1)]
    merged = read_peft(home / "merged")
    assert set(merged) == set(parts[0]) and len(merged) == 4
    for name, delta in merged.items():
        assert_close(delta.dense(), 2 * (0.25 * parts[0][name].dense() + 0.75 * parts[1][name].dense()), 1e-5)


def test_the_command_line_comes_over_the_recipe(home: Path) -> None:
    file = recipe(home)
    over = ["--method", "stack", "--weights", "1", "-1", "--out", str(home / "other"), "--rank", "1"]
    assert main(["merge", str(recipe(home, options={})), *over]) == 0
    assert not (home / "merged").exists()
    delta = next(iter(read_peft(home / "other").values()))
    assert delta.up.shape[1] == 1
    assert main(["merge", str(file), "--set", "scale=1"]) == 0


def test_a_recipe_of_whole_checkpoints(home: Path) -> None:
    """A fold is the base plus the mean of the experts: its difference from the base merges with an adapter."""
    assert main(["fold", str(home / "fixed"), str(home / "folded")]) == 0
    file = recipe(
        home,
        adapters=[str(home / "folded"), str(home / "experts" / "expert_1")],
        base=str(home / "base"),
        options={"scale": 1.0},
        missing="zero",
        same_base=False,
    )
    assert main(["merge", str(file)]) == 0
    got = AutoModelForCausalLM.from_pretrained(home / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(home / "base").state_dict()
    parts = [read_peft(home / "experts" / f"expert_{e}") for e in (0, 1)]
    name = "model.layers.1.mlp.down_proj.weight"
    expected = base[name] + 0.5 * parts[0][name].dense() + 1.5 * parts[1][name].dense()
    assert_close(got[name], expected, 1e-5)
    assert torch.equal(got["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_dry_runs_say_what_would_be_done_and_write_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe(home)
    before = files(home)
    commands = {
        ("merge", str(file)): ("task_arithmetic", "weight 0.75", "scale=2.0", "a PEFT LoRA adapter on 4 layers"),
        ("merge", str(file), "--base", str(home / "base")): ("a checkpoint, 4 of its tensors changed",),
        ("fold", str(home / "fixed"), str(home / "out")): ("folds 4 layers into LlamaForCausalLM",),
        ("export", str(home / "topk"), str(home / "out")): ("writes 2 experts of 2", "expert_1"),
        ("distill", str(home / "fixed"), str(home / "out"), "--rank", "4"): ("rank 4 on 4 layers", "no data"),
    }
    capsys.readouterr()
    for words, said in commands.items():
        assert main([*words, "--dry-run"]) == 0
        text = capsys.readouterr().out
        for part in (*said, "dry run: nothing was written"):
            assert part in text
        assert files(home) == before


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"methd": "ties"}, [], "unknown key 'methd'"),
        ({"methd": "ties"}, [], "Did you mean 'method'"),
        ({"method": "tie"}, [], "Did you mean 'ties'"),
        ({"method": "ties"}, [], "give equal ones"),
        ({"method": "regmean"}, [], "cannot be given on the command line"),
        ({"rank": 0}, [], "rank must be at least 1"),
        ({"options": {"scale": float("nan")}}, [], "scale must be a finite number"),
        ({"out": "/dev/null/x"}, [], "cannot be written"),
        ({"options": {"scal": 2}}, [], "Did you mean 'scale'"),
        ({"missing": "zeros"}, [], "Did you mean 'zero'"),
        ({"adapters": [{"path": "a", "wieght": 1}]}, [], "Did you mean 'weight'"),
        ({"adapters": [{"path": "a", "weight": 1}, "b"]}, [], "b has no weight and others have"),
        ({"adapters": []}, [], "adapters is empty"),
        ({"adapters": None}, [], "has no adapters"),
        ({"rank": "four"}, [], "rank must be a whole number, got 'four'"),
        ({"out": None}, [], "nowhere to write to"),
        ({"rank": 2, "base": "somewhere"}, [], "leave one out"),
        ({}, ["more"], "more is one too many"),
        ({}, ["--weights", "1"], "has 1 numbers, the adapters are 2"),
        ({"options": {"scale": [1]}}, ["--set", "scale"], "must look like key=value"),
    ],
)
def test_wrong_recipes(
    home: Path, changes: dict[str, Any], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for dry in ([], ["--dry-run"]):
        assert main(["merge", str(recipe(home, **changes)), *words, *dry]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    assert not (home / "merged").exists()


def test_wrong_files(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    assert "there is no configuration" in error("merge", "nothing.yaml", "--out", "x")
    (home / "bad.yaml").write_text("adapters: [")
    assert "is not YAML" in error("merge", str(home / "bad.yaml"), "--out", "x")
    (home / "bad.yaml").write_text("- a")
    assert "must hold key: value lines" in error("merge", str(home / "bad.yaml"), "--out", "x")
    merged = ["merge", str(recipe(home))]
    assert main(merged) == 0
    assert "exists already" in error(*merged) and "exists already" in error(*merged, "--dry-run")
    assert main([*merged, "--overwrite"]) == 0
    assert "same or one holds the other" in error(*merged, "--dry-run", "--out", str(home / "experts" / "expert_0"))
    other = home / "experts" / "expert_1" / "adapter_model.safetensors"
    other.write_bytes(other.read_bytes()[:-10])
    assert "truncated" in error(*merged, "--dry-run", "--out", str(home / "new"))
    whole = recipe(home, adapters=[str(home / "base")])
    assert "is a whole checkpoint" in error("merge", str(whole), "--out", str(home / "new"))
    assert not (home / "new").exists()


def test_fold_keeps_the_tokenizer(home: Path) -> None:
    assert main(["fold", str(home / "fixed"), str(home / "out"), "--shard-size", "5KB"]) == 0
    assert len(list((home / "out").glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(home / "out")("good")["input_ids"] == [3]
    expected = logits(moa.load(home / "fixed"))
    assert_close(logits(AutoModelForCausalLM.from_pretrained(home / "out")), expected, 1e-5)


def test_distill_prints_the_gap_and_writes_an_adapter(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config_values(home, home / "base", kind="generation")
    (home / "config.yaml").write_text(yaml.safe_dump(values))
    words = ["distill", str(home / "topk"), str(home / "out"), "--rank", "4", "--steps", "3", "--rows", "8"]
    assert main([*words, "--batch-size", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split()[0] for line in lines if line.strip()]
    assert starts[-4:-1] == ["mixture", "closed", "refined"] and lines[-1] == str(home / "out")
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    theirs = PeftModel.from_pretrained(base, home / "out")
    mixture = logits(moa.load(home / "topk"))
    off = (logits(theirs) - mixture).norm() / mixture.norm()
    with theirs.disable_adapter():
        alone = (logits(theirs) - mixture).norm() / mixture.norm()
    assert off < 0.5 * alone


def test_distilling_a_static_mixture_needs_no_data(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", str(home / "fixed"), str(home / "out"), "--rank", "4"]) == 0
    assert "exact" in capsys.readouterr().out
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / "base"), home / "out")
    assert_close(logits(theirs), logits(moa.load(home / "fixed")), 1e-5)
    assert main(["distill", str(home / "topk"), str(home / "other"), "--rank", "4"]) == 2
    assert "averaged over data" in capsys.readouterr().err
    assert main(["distill", str(home / "fixed"), str(home / "out"), "--rank", "4"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["merge", "export"])
def test_a_full_disk_is_one_line(
    home: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both writers fail as they do on a full disk: Python's own with a number, safetensors' with the system's words."""

    def ours(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    def theirs(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("moa.merge.write.write_safetensors", ours)
    monkeypatch.setattr("moa.formats.peft_export.save_file", theirs)
    words = {"merge": [str(recipe(home))], "export": [str(home / "topk"), str(home / "new")]}[command]
    before = files(home)
    assert main([command, *words]) == 2
    error = capsys.readouterr().err
    assert f"moa {command}: {home}" in error and "No space left on device" in error and "Traceback" not in error
    assert {f for f in files(home) - before if f.is_file()} == set()


def test_other_errors_of_the_system_are_said(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moa.merge.write.write_safetensors", broken)
    assert main(["merge", str(recipe(home))]) == 2
    assert "cannot be written: Input/output error" in capsys.readouterr().err


def test_export_writes_what_vllm_serves_and_serve_names_the_engine(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = home / "served"
    assert main(["export", str(home / "topk"), "--to", "vllm", str(out)]) == 0
    assert {"config.json", "moa.safetensors", "model.safetensors"} <= {file.name for file in out.iterdir()}
    assert main(["serve", "--dry-run", str(out), "--", "--port", "8001"]) == 0
    assert capsys.readouterr().out.endswith(f"-m vllm.entrypoints.openai.api_server --model {out} --port 8001\n")
    assert main(["serve", str(home / "topk"), "--engine", "vllm"]) == 2
    assert "moa export CHECKPOINT --to vllm OUT" in capsys.readouterr().err
    assert main(["export", str(home / "topk"), "--to", "vllm", "--expert", "1", str(home / "no")]) == 2
    assert "--expert 1 is for --to peft" in capsys.readouterr().err
    assert main(["export", str(home / "topk"), "--to", "peft-tasks", str(home / "no")]) == 2
    assert "depends on the input" in capsys.readouterr().err
