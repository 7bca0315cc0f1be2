"""`exclude` and `layers` choose the layers that peft chooses. Run: pytest tests/mixture/test_narrow.py"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn

import moa
from moa.errors import ConfigError
from moa.mixture import Narrowing, find_blocks, find_sites
from moa.runs.config import parse
from tests import models
from tests.model.test_bases import base
from tests.model.test_towers import clip, llava

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # peft corrects it layer by layer
]
BASES = {
    "llama": models.llama,
    "gpt2": models.gpt2,
    "t5": models.t5,
    "vit": models.vit,
    "clip": clip,
    "llava": llava,
    "Jamba": lambda: base("Jamba"),
}


def adapted_by_peft(model: nn.Module, **options: Any) -> set[str]:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    found = {n for n, m in wrapped.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    return {name.removeprefix("base_model.model.") for name in found}


def built(model: nn.Module, **options: Any) -> moa.MoAModel:
    return moa.build(model, "topk", **options)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
    ),
    ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"], "exclude_modules": ["v_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\.self_attn\.[qv]_proj"}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1], "layers_pattern": "h"}),
    ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [0], "exclude_modules": ["EncDecAttention.q"]}),
    ("t5", {"target_modules": ["q", "v", "wo"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["q", "wo"], "layers_to_transform": [1], "layers_pattern": "layer"}),
    ("vit", {"target_modules": ["q_proj", "query"], "layers_to_transform": [1]}),
    ("clip", {"target_modules": ["q_proj", "fc1"], "exclude_modules": r"vision_model.*", "layers_to_transform": [1]}),
    ("llava", {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*", "layers_to_transform": [0]}),
    ("Jamba", {"target_modules": ["in_proj", "q_proj", "x_proj"], "layers_to_transform": [1]}),
]


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_the_layers_are_those_that_peft_adapts(kind: str, options: dict[str, Any]) -> None:
    there = {name.rpartition(".")[2] for name, _ in BASES[kind]().named_modules()}
    options = {**options, "target_modules": [n for n in options["target_modules"] if n.rpartition(".")[2] in there]}
    theirs = adapted_by_peft(BASES[kind](), **options)
    model = built(BASES[kind](), **options)
    assert set(model.mixtures()) == theirs
    assert len(theirs) < len(built(BASES[kind](), target_modules=options["target_modules"]).mixtures()) or (
        options.get("layers_to_transform") == [0, 1]
    )


def test_a_tower_is_left_out_by_its_name() -> None:
    everything = set(built(llava()).mixtures())
    for exclude in (["vision_tower"], r"model\.vision_tower", ["vision_tower", "multi_modal_projector"]):
        kept = set(built(llava(), exclude=exclude).mixtures())
        out = ("vision", "projector") if len(exclude) == 2 else ("vision",)
        assert kept == {name for name in everything if not any(word in name for word in out)} < everything


def test_groups_blocks_and_fused_experts_are_narrowed() -> None:
    names = {site.name for site in find_sites(models.llama(), "ffn", Narrowing(("gate_proj",), (1,)))}
    assert names == {"model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    assert [s.name for s in find_blocks(models.llama(), "all-linear", Narrowing(layers=1))] == ["model.layers.1"]
    with pytest.warns(moa.errors.UnadaptedWarning, match="experts on 1 MixtralExperts; 2 fused expert tensors"):
        fused = built(base("Mixtral"), targets="moe-experts", layers=[1])
    assert list(fused.mixtures()) == ["model.layers.1.mlp.experts"]


def test_what_is_excluded_is_not_complained_of() -> None:
    """A grouped convolution cannot carry experts, and need not."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ConfigError, match="2 groups"):
        built(net, targets=r"\d")
    assert list(built(net, targets=r"\d", exclude=["1"]).mixtures()) == ["0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": ["vision_towr"]}, r"exclude='vision_towr' matches no module of Llava\w+\. Near: vision_tower"),
        ({"exclude": ["vision_tower", "nowhere"]}, r"exclude='nowhere' matches no module"),
        ({"exclude": "vision_tower"}, r"matches no module .*Near: vision_tower.*a list holds name endings"),
        ({"exclude": ["model"]}, r"exclude=\('model',\) leaves none of the \d+ layers"),
        ({"exclude": "("}, r"exclude='\(' is not a regular expression"),
        ({"exclude": 3}, r"exclude must be .*, got 3"),
        ({"exclude": [""]}, r"exclude must be text or a list"),
        ({"layers": [0, 2]}, r"layers=\(0, 2\): .* in blocks numbered 0 to 1; 2 is not among them"),
        ({"layers": 7, "layers_pattern": "layers"}, r"layers=7: .* numbered 0 to 1 of 'layers'; 7 is not"),
        ({"layers": 0, "layers_pattern": "h"}, r"in no numbered block of 'h'; 0 is not"),
        ({"layers": -1}, r"layers must be a block's number from 0 or a list of them, got -1"),
        ({"layers": "1"}, r"layers must be a block's number .*, got '1'"),
        ({"layers": True}, r"layers must be .*, got True"),
        ({"layers": [0, 1.0]}, r"layers must be .*, got \[0, 1.0\]"),
        ({"layers": []}, r"layers must be a block's number"),
        ({"layers_pattern": "layers"}, r"layers_pattern='layers' changes nothing: it needs layers"),
        ({"layers": 0, "layers_to_transform": 0}, r"layers is given twice"),
    ],
)
def test_what_names_nothing_is_an_error(options: dict[str, Any], words: str) -> None:
    model = llava()
    with pytest.raises(ConfigError, match=words):
        built(model, **options)
    assert not any(isinstance(module, moa.mixture.Mixture) for module in model.modules())


def test_mixlora_wants_whole_blocks_of_what_is_left() -> None:
    model = moa.build(models.llama(), "mixlora", layers=1)
    assert {name.split(".")[2] for name in model.mixtures()} == {"1"}
    with pytest.raises(ConfigError, match=r"the targets leave out model\.layers\.0\.mlp\.gate_proj"):
        moa.build(models.llama(), "mixlora", exclude=["gate_proj"])


def test_a_checkpoint_keeps_them(tmp_path: Path) -> None:
    model = models.randomise(built(models.llama(), exclude={"v_proj", "mlp"}, layers=range(1, 2)))
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, models.llama())
    recipe = again.recipes[0][0]
    assert (recipe.exclude, recipe.layers, recipe.layers_pattern) == (("mlp", "v_proj"), (1,), None)
    assert list(again.mixtures()) == list(model.mixtures())
    batch = models.token_batch()
    assert models.outputs_of(again, batch).equal(models.outputs_of(model, batch))


def test_a_run_takes_them() -> None:
    def recipe(**options: Any) -> dict[str, Any]:
        task = {"kind": "classification", "train": "t.csv", "labels": ["a", "b"]}
        values = {"base": "b", "output": "o", "tasks": {"t": task}, "recipe": {"router": "topk", **options}}
        return dict(parse(values).recipe)

    assert recipe(layers_to_transform=[0, 1], exclude_modules="a.*")["layers"] == [0, 1]
    assert recipe(layers=1, layers_pattern="h", exclude=["a"])["layers"] == 1
    for options, words in (
        ({"layers": "1"}, "recipe: layers must be a whole number, got '1'"),
        ({"layers": [0.5]}, "recipe: layers must be a whole number"),
        ({"exclude": 3}, "recipe: exclude must be text, got 3"),
        ({"layers_pattern": "h"}, "it needs layers"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            recipe(**options)
