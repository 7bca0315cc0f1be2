"""`moa init`, `moa recipes`, `import:` and peft's words. Run: pytest tests/cli/test_examples.py"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import moa
from moa.cli.cmd_init import EXAMPLES
from moa.cli.main import main
from moa.cli.merge_config import read_merge
from moa.experts import FAMILIES
from moa.merge import read_peft
from moa.recipes import RECIPES, make_recipe
from moa.runs.config import parse, read_config
from moa.runs.yaml_values import read_values
from tests import models
from tests.tiny_run import config_values, decoder_folder, encoder_folder, rows, write_jsonl


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_are_configurations(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    assert main(["init", kind, "--out", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    if kind == "merge":
        assert read_merge(read_values(file), str(file)).method == "ties"
    else:
        assert next(iter(read_config(file).tasks.values())).kind == kind
    text = file.read_text()
    assert main(["init", kind, "--out", str(file)]) == 2
    assert "exists already" in capsys.readouterr().err and file.read_text() == text


@pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")
def test_an_example_trains_once_its_names_are_put_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    write_jsonl(tmp_path / "reviews.jsonl", rows(24, 0))
    names = [f"base={encoder_folder(tmp_path / 'base')}", "tasks.reviews.train=reviews.jsonl", "max_length=16"]
    sets = [word for name in [*names, "training.use_cpu=true"] for word in ("--set", name)]
    assert main(["train", "classification.yaml", *sets, "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists()
    assert main(["train", "classification.yaml", *sets]) == 0
    assert (tmp_path / "runs" / "first" / "model" / "model.safetensors").is_file()


def test_unknown_examples_and_recipes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "chatt"]) == 2
    assert "Did you mean 'chat'?" in capsys.readouterr().err
    assert main(["recipes", "remiks"]) == 2
    assert "Did you mean 'remix'?" in capsys.readouterr().err


def test_the_table_names_every_recipe_and_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    for name in (*RECIPES, *FAMILIES):
        assert f"  {name} " in text


@pytest.mark.parametrize("name", [*RECIPES, *FAMILIES])
def test_every_keyword_has_type_default_and_meaning(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    for field in dataclasses.fields(RECIPES.get(name) or FAMILIES[name]):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  {field.name}: "))
        assert lines[at] == f"  {field.name}: {field.type}, default {field.default!r}"
        assert lines[at + 1].startswith("      "), f"{name}.{field.name} is not documented"


def test_pefts_words_are_those_of_build(tmp_path: Path) -> None:
    words = {"router": "topk", "r": 4, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    values = {"base": "a", "output": "b", "tasks": {"a": {"train": "x.csv"}}, "recipe": words}
    recipe = make_recipe(**parse(values).recipe)
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.targets) == (4, 16, 0.1, ("q_proj",))


ROUTER = '''
from dataclasses import dataclass
import moa
from moa.recipes.gates import SoftmaxRecipe

@dataclass(frozen=True, kw_only=True)
class Mine(SoftmaxRecipe):
    """My own."""

if "mine_of_a_test" not in moa.RECIPES:
    moa.register_recipe("mine_of_a_test")(Mine)
'''


def test_a_module_of_ones_own_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moa.recipes import gates

    parent = next(cls.__name__ for cls in vars(gates).values() if getattr(cls, "name", "") == "topk")
    (tmp_path / "my_router_of_a_test.py").write_text(ROUTER.replace("SoftmaxRecipe", parent))
    values = config_values(tmp_path, decoder_folder(tmp_path / "base"), "generation")
    values["recipe"] = {"router": "mine_of_a_test", "n_experts": 2, "k": 1, "rank": 2}
    values["training"] |= {"max_steps": 1}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert main(["train", str(tmp_path / "a.yaml")]) == 2
    assert "unknown router 'mine_of_a_test'" in capsys.readouterr().err
    values["import"] = [str(tmp_path / "my_router_of_a_test.py")]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    try:
        assert main(["train", str(tmp_path / "a.yaml")]) == 0
        assert main(["eval", values["output"]]) == 0
    finally:
        RECIPES.pop("mine_of_a_test", None)
        sys.modules.pop("my_router_of_a_test", None)
    assert yaml.safe_load((Path(values["output"]) / "config.yaml").read_text())["import"] == values["import"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_adapters_of_classifiers_merge_without_their_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """peft saves the classifier beside the factors; it is left out, and that is said; the changes add up."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig.from_pretrained(encoder_folder(tmp_path / "base"))
    for seed in (0, 1):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        get_peft_model(BertForSequenceClassification(config), lora).save_pretrained(tmp_path / f"a{seed}")
    parts = [str(tmp_path / f"a{seed}") for seed in (0, 1)]
    words = ["merge", *parts, "--method", "task_arithmetic", "--out", str(tmp_path / "merged")]
    assert main(words) == 0
    assert "classifier was trained whole and is left out" in capsys.readouterr().out
    stored = [load_file(Path(part) / "adapter_model.safetensors") for part in parts]
    assert any("classifier" in key for key in stored[0])
    merged = read_peft(tmp_path / "merged")
    assert len(merged) == 2
    for name, delta in merged.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        want = sum(t[f"{key}B.weight"] @ t[f"{key}A.weight"] for t in stored)  # alpha = r, so the scale is 1
        torch.testing.assert_close(delta.dense(), want, rtol=1e-4, atol=1e-6)


def test_the_plainest_merge_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:

    from moa.merge import read_peft

    base = AutoModelForCausalLM.from_pretrained(decoder_folder(tmp_path / "base"))
    model = models.randomise(moa.build(base, "fixed", n_experts=2, rank=2, targets=["q_proj"]))
    model.save_pretrained(tmp_path / "m")
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "e")]) == 0
    words = ["merge", str(tmp_path / "e" / "expert_0"), str(tmp_path / "e" / "expert_1"), "--out", str(tmp_path / "c")]
    capsys.readouterr()
    outcomes = []
    for options in ([*words, "--method", "average", "--dry-run"], [*words, "--method", "average"]):
        outcomes.append(main(options))
    assert outcomes == [0, 0]
    assert next(iter(read_peft(tmp_path / "c").values())).up.shape[1] == 4
    assert main([*words, "--overwrite", "--method", "ties", "--set", "density=0.5"]) == 0
    assert next(iter(read_peft(tmp_path / "c").values())).up.shape[1] <= 4
