"""The command line: exit codes, help, each sub-command. Run: pytest tests/cli/test_main.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import moa
from moa.cli.main import main
from tests.tiny_run import config_values, decoder_folder, encoder_folder

pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration file of a run that `moa train` has made."""
    folder = tmp_path_factory.mktemp("cli")
    values: dict[str, Any] = config_values(folder, encoder_folder(folder / "base"))
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    overrides = ["--set", "training.num_train_epochs=1", "--set", f"output={folder / 'run'}"]
    assert main(["train", str(folder / "config.yaml"), *overrides]) == 0
    return folder / "config.yaml"


@pytest.fixture
def saved_decoder(tmp_path: Path) -> Path:
    """Return a checkpoint of LoRA experts, all different, on a decoder in a folder."""
    base = AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path / "base"))
    model = moa.build(base, "fixed", n_experts=2, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bank.up"):
                torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_inspect_prints_what_is_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run.parent / "run")]) == 0
    text = said(capsys)
    for part in ("moa format 2", "MultiTaskForSequenceClassification", "heads", "recipe topk", '"n_experts": 4'):
        assert part in text
    line = next(row for row in text.splitlines() if "layer.0.intermediate.dense" in row)
    assert "concat" in line and "down (4, 2, 16)" in line and "up (4, 2, 24)" in line
    assert line.split()[1:3] == [str(4 * 2 * (16 + 24)), str(4 * 16)]


def test_inspect_asks_the_dispatcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path / "base"))
    moa.build(base, "topk", n_experts=64, k=1, rank=8, targets=["q_proj"]).save_pretrained(tmp_path / "many")
    assert main(["inspect", str(tmp_path / "many")]) == 0
    assert "sorted" in next(row for row in said(capsys).splitlines() if "layers.0.self_attn.q_proj" in row)


def test_eval_scores_the_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run.parent / "run")]) == 0
    results = json.loads((run.parent / "run" / "results.json").read_text())
    row = next(line for line in said(capsys).splitlines() if line.startswith("first"))
    assert f"{results['scores']['mixture']['first']['accuracy']:.3f}" in row


def test_report_writes_a_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.parent / "run")]) == 0
    assert Path(said(capsys).strip()).read_text().startswith("<!doctype html>")
    assert main(["report", str(run.parent / "run"), "--spectra"]) == 0
    page = Path(said(capsys).strip()).read_text()
    assert "Spectra of the experts" in page and page.count(" (load)</td>") == 12, "of each of the run's layers"
    assert "entropy of changes over cuts" in page and "Attention outputs" not in page
    assert main(["report", str(run.parent / "run"), "--spectra", "--rows", "4"]) == 0
    page = Path(said(capsys).strip()).read_text()
    assert all(f"<td class=name>encoder.encoder.layer.{n}.attention.self</td>" in page for n in range(2))
    assert page.count("<td>+1.000</td>") >= 2 and "pull them apart" in page  # each task's gradient with itself
    for words in (["--rows", "4"], ["--spectra", "--rows", "0"]):
        assert main(["report", str(run.parent / "run"), *words]) == 2
        assert "--rows" in capsys.readouterr().err


# peft 0.21 asks a transformers attribute that 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_export_writes_folders_that_peft_loads(
    saved_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved_decoder), str(tmp_path / "out")]) == 0
    assert [Path(line).name for line in said(capsys).splitlines()] == ["expert_0", "expert_1"]
    model = moa.load(saved_decoder)
    ids = torch.tensor([[3, 4, 5, 6]])
    for expert in (0, 1):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        theirs = PeftModel.from_pretrained(base, str(tmp_path / "out" / f"expert_{expert}"))
        with model.pin_expert(expert):
            torch.testing.assert_close(theirs(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert main(["export", str(saved_decoder), str(tmp_path / "one"), "--expert", "1"]) == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["expert_1"]


def test_fold_saves_a_plain_model(saved_decoder: Path, tmp_path: Path) -> None:
    assert main(["fold", str(saved_decoder), str(tmp_path / "folded")]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = moa.load(saved_decoder)(input_ids=ids).logits
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_merge_writes_an_adapter_or_a_checkpoint(
    saved_decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(saved_decoder), str(tmp_path / "out")]) == 0
    experts = [str(tmp_path / "out" / f"expert_{e}") for e in (0, 1)]
    assert main(["merge", *experts, "--method", "average", "--out", str(tmp_path / "merged")]) == 0
    assert (
        main(["merge", *experts, "--method", "average", "--base", str(tmp_path / "base"), "--out", f"{tmp_path}/m"])
        == 0
    )
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = moa.load(saved_decoder)(input_ids=ids).logits  # router "fixed": the average of both experts
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(whole(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    options = ["--set", "density=0.5", "--rank", "1", "--out", str(tmp_path / "ties")]
    assert main(["merge", *experts, "--method", "ties", *options]) == 0
    assert "relative error of squeezing" in said(capsys)
    assert main(["merge", *experts, "--method", "tie", "--out", str(tmp_path / "x")]) == 2
    assert "Did you mean 'ties'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "nowhere/at/all"], "no folder nowhere/at/all"),
        (["train", "nothing.yaml"], "there is no configuration nothing.yaml"),
        (["report", "nothing"], "there is no folder nothing"),
        (["demo", "--model", "minilmm"], "unknown model 'minilmm'"),
        (["demo", "--set", "seed=1"], "--set changes a packaged configuration: say which one"),
        (["demo", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["eval", "nothing"], "there is no folder nothing"),
        (["inspect", ".", "--dtype", "floaty"], "not a torch dtype"),
    ],
)
def test_errors_exit_with_2_and_no_traceback(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"moa {words[0]}: ") and message in error
    assert "Traceback" not in error


def test_folding_a_learned_routing_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fold", str(run.parent / "run"), str(tmp_path / "out")]) == 2
    assert "depends on the input" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_run_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(run), "--set", f"output={run.parent / 'run'}"]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["train", "--help"], ["--help"], ["inspect", "--help"], ["demo", "-h"], ["merge", "-h"]]
)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    text = said(capsys)
    if words == ["--help"]:
        for name in (
            "init",
            "demo",
            "train",
            "recipes",
            "eval",
            "predict",
            "generate",
            "inspect",
            "report",
            "merge",
            "fold",
            "distill",
            "export",
            "bench",
        ):
            assert f"    {name} " in text
    if words[0] == "merge":
        assert "ties (" in text and "density=REQUIRED" in text
    if words[0] == "train":
        for key in ("max_length:", "eval_fraction:", "search_epochs:", "max_new_tokens:"):
            assert key in text


def test_bench_says_where_it_lives(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moa", "--version"], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == moa.__version__
