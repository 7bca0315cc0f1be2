"""The table of strategies, its keywords, and runs of `moa train` by them."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import moa
from moa.errors import ConfigError
from moa.runs.config import parse
from moa.runs.preflight import check_run
from moa.runs.run_model import build_model
from moa.runs.session import Run
from moa.runs.train import prepare, train
from moa.training.quantisation_aware import read_scales, run_on_integers
from moa.training.strategies import make_strategy
from moa.training.strategy import STRATEGIES
from tests.tiny_run import config_values, encoder_folder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
pytestmark = pytest.mark.filterwarnings("ignore::moa.monitor.statistics.RoutingCollapseWarning")


@pytest.mark.parametrize(
    ("strategy", "training", "message"),
    [
        ({"name": "lora-prp"}, {}, r"strategy: unknown strategy 'lora-prp'.*Did you mean 'lora-pro'"),
        ({"mode": "sgd"}, {}, r"strategy has no name: choose one of lora-sb, eva, qwha, lora-pro, lisa"),
        ({"name": "lora-pro", "mod": "sgd"}, {}, r"unknown keyword 'mod'.*strategy 'lora-pro'.*Did you mean 'mode'"),
        ({"name": "lora-pro", "mode": "sdg"}, {}, r"unknown mode 'sdg'.*Did you mean 'sgd'"),
        ({"name": "lora-pro", "mode": True}, {}, r"strategy: unknown mode True|mode must be"),
        ({"name": 3}, {}, r"unknown strategy 3"),
        ({"name": "lora-pro"}, {"optim": "sgd"}, r"training.optim has no effect under strategy 'lora-pro'"),
        ({"name": "galore", "projection": "sdt"}, {}, r"unknown projection 'sdt'.*Did you mean 'std'"),
        ({"name": "galore", "rank": 4}, {"optim": "sgd"}, r"training.optim has no effect under strategy 'galore'"),
        ({"name": "quantisation_aware", "bits": 9}, {}, r"bits must be a whole number from 2 to 8, got 9"),
        ({"name": "quantisation_aware", "share": 0.0}, {}, r"share is of a layer's mean scale, above 0"),
        ({"name": "squeeze"}, {}, r"ranks must fall from stage to stage"),
        ({"name": "squeeze", "ranks": [4, 8]}, {}, r"ranks must fall from stage to stage.*got"),
        ({"name": "mosa", "by": "row"}, {}, r"unknown value of by 'row'.*Did you mean 'rows'"),
        ({"name": "lora-pro"}, {"fsdp": "full_shard"}, r"training.fsdp shards them: leave one out"),
    ],
)
def test_bad_strategies_are_named_before_anything_starts(
    strategy: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    values = {"base": "b", "output": "o", "tasks": {"a": {"train": "a.jsonl"}}}
    with pytest.raises(ConfigError, match=message):
        parse({**values, "strategy": strategy, "training": training}, recipe=False)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_keyword_refuses_what_it_cannot_use(name: str) -> None:
    for field in dataclasses.fields(STRATEGIES[name]):
        for value in ("text", [], {"a": 1}, float("nan"), 10**30, -1):
            with pytest.raises(ConfigError):
                make_strategy(name, **{field.name: value})
        with pytest.raises(ConfigError, match=f"Did you mean '{field.name}'"):
            make_strategy(name, **{f"{field.name}x": 1})


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_page_lists_every_strategy_with_its_keywords(name: str) -> None:
    row = re.search(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
    assert row is not None
    for field in dataclasses.fields(STRATEGIES[name]):
        assert f"`{field.name}" in row[0], field.name


def test_the_page_s_keys_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base-before-it-was-quantised").mkdir()
    texts = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    found = {yaml.safe_load(text)["strategy"]["name"] for text in texts}
    assert found == set(STRATEGIES)
    for text in texts:
        made = yaml.safe_load(text)["strategy"]
        assert isinstance(make_strategy(**made), STRATEGIES[made["name"]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("base"))


def run_values(tmp_path: Path, base: Path, strategy: dict[str, Any], **recipe: Any) -> dict[str, Any]:
    made = config_values(tmp_path, base)
    made["recipe"] |= recipe
    made["training"] |= {"max_steps": 4, "num_train_epochs": 1}
    return {**made, "strategy": strategy, "score_before": False}


def test_a_run_steps_by_its_strategy_and_goes_on_where_it_stopped(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    whole = Run.trainer

    def seen(self: Run, *args: Any, **options: Any) -> Any:
        trainer = whole(self, *args, **options)
        used.append(type(trainer.optimizer).__name__)
        return trainer

    monkeypatch.setattr(Run, "trainer", seen)
    made = run_values(tmp_path, base, {"name": "lora-pro", "mode": "adam"}, targets=["query"])
    made["training"] |= {"save_steps": 2, "lr_scheduler_type": "constant"}
    results = train(parse(made)).results
    assert "LoRAPro" in used
    again = {**made, "training": {**made["training"], "max_steps": 6}}
    further = train(parse(again), resume=True).results
    straight = {**again, "output": str(tmp_path / "straight")}
    expected = train(parse(straight)).results
    assert further["scores"]["mixture"]["first"]["loss"] == pytest.approx(
        expected["scores"]["mixture"]["first"]["loss"], abs=1e-6
    )
    assert further["scores"]["mixture"]["first"]["loss"] != results["scores"]["mixture"]["first"]["loss"]


def test_a_run_starts_where_its_rows_say_and_a_resumed_one_goes_on(tmp_path: Path, base: Path) -> None:
    made = run_values(tmp_path, base, {"name": "lora-sb", "lr": 0.05}, expert="core", save_bases=True)
    made["training"] |= {"save_steps": 2, "lr_scheduler_type": "constant"}
    results = train(parse(made)).results
    plain = {**made, "output": str(tmp_path / "plain")}
    plain.pop("strategy")
    assert results["scores"] != train(parse(plain)).results["scores"]
    again = {**made, "training": {**made["training"], "max_steps": 6}}
    further = train(parse(again), resume=True).results["scores"]["mixture"]["first"]["loss"]
    expected = train(parse({**again, "output": str(tmp_path / "straight")})).results["scores"]["mixture"]["first"]
    assert further == pytest.approx(expected["loss"], abs=1e-6)


def test_a_run_starts_where_quantising_lost(tmp_path: Path, base: Path) -> None:
    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    tensors = load_file(base / "model.safetensors")
    layers = [name for name in tensors if ".layer." in name and name.endswith("weight") and tensors[name].ndim == 2]
    for name in layers:
        scale = tensors[name].abs().max() / 3
        tensors[name] = (tensors[name] / scale).round() * scale
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    recipe = {"expert": "qwha", "mask": "given", "density": 0.3}
    made = run_values(tmp_path, quantised, {"name": "qwha", "original": str(base), "batches": 2}, **recipe)
    made["recipe"].pop("rank", None)
    made["training"] |= {"learning_rate": 1e-6, "max_steps": 1}  # a step of it hardly moves what started at zero
    train(parse(made))
    found = load_file(next((tmp_path / "run").rglob("model.safetensors")))
    values = [tensor for name, tensor in found.items() if name.endswith(".values")]
    assert values and all(float(tensor.abs().max()) > 1e-3 for tensor in values)
    with pytest.raises(ConfigError, match=r"strategy: original: nowhere does not exist"):
        parse({**made, "strategy": {"name": "qwha", "original": "nowhere"}})
    with pytest.raises(ConfigError, match=r"strategy: 'qwha' restores what quantising the base lost.*give original="):
        parse({**made, "strategy": {"name": "qwha"}})
    other = tmp_path / "other"
    other.mkdir()
    save_file({"a.weight": torch.zeros(2, 2)}, other / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the original weights hold no one"):
        train(parse({**made, "strategy": {"name": "qwha", "original": str(other)}, "output": str(tmp_path / "none")}))
    assert not (tmp_path / "none").exists()


STARTS = [("lora-sb", "expert='core'"), ("eva", "expert='lora'"), ("qwha", "expert='qwha'")]


@pytest.mark.parametrize(("name", "says"), STARTS)
def test_a_start_that_does_not_fit_stops_before_anything_is_written(
    tmp_path: Path, base: Path, name: str, says: str
) -> None:
    own = {"original": str(base)} if name == "qwha" else {}
    made = run_values(tmp_path, base, {"name": name, **own}, expert="vera")
    with pytest.raises(ConfigError, match=says):
        train(parse(made))
    assert not (tmp_path / "run").exists()


def test_a_strategy_that_does_not_fit_the_recipe_stops_before_anything_is_written(tmp_path: Path, base: Path) -> None:
    made = run_values(tmp_path, base, {"name": "lora-pro"}, expert="ia3")
    made["recipe"].pop("rank")
    with pytest.raises(ConfigError, match="experts hold no two factors that are trained"):
        train(parse(made))
    assert not (tmp_path / "run").exists()


def test_galore_steps_a_run_and_goes_on_where_it_stopped(
    tmp_path: Path, base: Path, galore_torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run_values(tmp_path, base, {"name": "galore", "rank": 2, "every": 3}, targets=["query"])
    made["training"] |= {"max_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}
    train(parse(made))
    again = {**made, "training": {**made["training"], "max_steps": 4}}
    further = train(parse(again), resume=True).results["scores"]["mixture"]["first"]["loss"]
    straight = train(parse({**again, "output": str(tmp_path / "straight")})).results["scores"]["mixture"]["first"]
    assert further == pytest.approx(straight["loss"], abs=1e-6)
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(ConfigError, match="GaLore needs galore-torch and the bitsandbytes"):
        train(parse({**again, "output": str(tmp_path / "without")}))
    assert not (tmp_path / "without").exists()


def test_a_quantisation_aware_run_is_scored_on_its_integers_and_keeps_its_scales(tmp_path: Path, base: Path) -> None:
    recipe = {"router": "fixed", "n_experts": 1, "rank": 2, "targets": ["query"]}
    made = run_values(tmp_path, base, {"name": "quantisation_aware", "bits": 3, "share": 0.1, "scale_lr": 1e-3})
    made["recipe"] = recipe
    made["training"] |= {"max_steps": 2, "save_steps": 2, "lr_scheduler_type": "constant"}
    train(parse(made))
    again = {**made, "training": {**made["training"], "max_steps": 4}}
    further = train(parse(again), resume=True).results["scores"]["mixture"]
    straight = train(parse({**again, "output": str(tmp_path / "straight")})).results["scores"]["mixture"]
    assert further == straight
    checked = check_run(parse({**again, "output": str(tmp_path / "other")}), False)
    _, run, _, _ = prepare(checked)
    empty = build_model(parse(again), run.tasks)
    model = moa.load(tmp_path / "run" / "model", base=empty.unload())
    unrounded = run.evaluate(model)
    assert read_scales(model, tmp_path / "run" / "scales.safetensors") == 3
    run_on_integers(model, 3)
    assert run.evaluate(model) == further != unrounded


def test_a_layer_that_is_not_one_weight_stops_before_anything_is_written(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"only experts with factors .* under a constant routing"):
        train(parse(run_values(tmp_path, base, {"name": "quantisation_aware"})))
    assert not (tmp_path / "run").exists()
