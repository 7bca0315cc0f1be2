"""The list of PEFT's options against peft itself: none is unknown, none ignored.

Run: pytest tests/formats/test_peft_options.py
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import peft
import pytest
import torch

import moa
from moa.errors import CheckpointError
from moa.formats.peft_options import INITS, OPTIONS, by_pattern, is_set
from moa.merge import read_peft
from tests import models
from tests.merge.tools import lora_folder

REFUSED = sorted(name for name, option in OPTIONS.items() if option.verdict == "refused")
PAIR = {"m": (torch.ones(2, 4), torch.ones(3, 2))}


def options_of(config: Any) -> set[str]:
    """Return the names of a configuration's options, asked of peft."""
    return {field.name for field in dataclasses.fields(config)}


def test_the_list_is_pefts():
    assert set(OPTIONS) == options_of(peft.LoraConfig)


def test_the_list_fails_on_a_new_option():
    @dataclasses.dataclass
    class Newer(peft.LoraConfig):
        tomorrow: int = 3

    assert options_of(Newer) - set(OPTIONS) == {"tomorrow"}


def test_every_start_of_peft_is_known():
    """peft says them in the option's type: true, false or one of a list of names."""
    named = get_args(get_type_hints(peft.LoraConfig)["init_lora_weights"])
    literals = {value for part in named for value in get_args(part)}
    assert "olora" in literals
    said = {re.sub(r"\[.*\]", "", value).rstrip("_") for value in literals} | {"true", "false", "lora_ga"}
    assert set(INITS) == said


def test_every_variant_of_peft_is_named():
    """What peft itself marks as more than a LoRA is never called honoured, and harmless only where tests show it."""
    variants = {f.name for f in dataclasses.fields(peft.LoraConfig) if f.metadata.get("is_lora_variant")}
    harmless = {name for name in variants if OPTIONS[name].verdict == "harmless"}
    assert harmless == {"velora_config"}  # shown in test_peft_folder
    assert not {name for name in variants if OPTIONS[name].verdict == "honoured"}


@pytest.mark.parametrize("read", ["merge", "experts"])
@pytest.mark.parametrize("key", REFUSED)
def test_refused_by_name_with_the_reason_by_every_reader(key: str, read: str, tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "a", PAIR, **{key: [1]})
    with pytest.raises(CheckpointError, match=rf"sets {key}=\[1\], and {re.escape(OPTIONS[key].why[:40])}"):
        if read == "merge":
            read_peft(folder)
        else:
            moa.build(models.llama(), "topk", experts=[folder], k=1)


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_off_is_not_refused(key: str, tmp_path: Path) -> None:
    for number, off in enumerate([None, False, [], {}]):
        assert len(read_peft(lora_folder(tmp_path / str(number), PAIR, **{key: off}))) == 1


@pytest.mark.parametrize("value", [True, 1, 0, 0.0, "fast", [1], {"a": 1}])
def test_an_unknown_option_is_refused_not_ignored(value: object, tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "a", PAIR, use_tomorrow=value)
    with pytest.raises(CheckpointError, match=r"sets use_tomorrow=.* does not know"):
        read_peft(folder)
    with pytest.raises(CheckpointError, match=r"sets use_tomorrow=.* does not know"):
        moa.build(models.llama(), "topk", experts=[folder], k=1)


@pytest.mark.parametrize("value", [None, False, "", "none", [], {}])
def test_an_unknown_option_that_is_off_is_harmless(value: object, tmp_path: Path) -> None:
    assert not is_set(value)
    assert len(read_peft(lora_folder(tmp_path / "a", PAIR, use_tomorrow=value))) == 1


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("loftq", "quantised ones"),
        ("tomorrow", "does not know what it does to the base"),
        ("pissa", "initial=.* or base=.* path_initial_model_for_weight_conversion"),
        ("olora", "initial=.* or base="),
        ("pissa_niter_4", "random decomposition.*initial="),
        ("corda", "decomposition by data.*initial="),
        ("lora_ga", "gradients of data.*initial="),
    ],
)
def test_starts_that_move_the_base_are_refused_without_it(init: str, words: str, tmp_path: Path) -> None:
    folder = lora_folder(tmp_path / "a", PAIR, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights='{init}'.*{words}"):
        read_peft(folder)


@pytest.mark.parametrize("pattern", ["(.*)*z", r"(a|a)*b$|(\w+\.?)+!"])
def test_a_pattern_that_never_ends_is_an_error(pattern: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moa.formats.peft_options.PATIENCE", 0.2)
    module = "model.layers.0.self_attn.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa_proj"
    pair = {module: PAIR["m"]}
    folder = lora_folder(tmp_path / "a", pair, alpha_pattern={pattern: 8})
    try:
        read = read_peft(folder)
    except CheckpointError as error:
        assert repr(pattern) in str(error)
    else:  # an engine that sees through the pattern finds that it fits nothing
        assert torch.equal(read[f"{module}.weight"].dense(), pair[module][1] @ pair[module][0])


def test_a_pattern_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, **__: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("regex.match", late)
    with pytest.raises(CheckpointError, match=r"\(x\+\)\+.* does not come to an end on 'q_proj'"):
        by_pattern({"(x+)+": 1}, "q_proj", 2, "here")


def test_a_pattern_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'q_proj\(' is no regular expression"):
        read_peft(lora_folder(tmp_path / "a", PAIR, alpha_pattern={"q_proj(": 8}))


@pytest.mark.parametrize(
    ("patterns", "module"),
    [
        ({"q_proj": 1, "v_proj": 3}, "model.layers.0.self_attn.v_proj"),
        ({"proj": 1}, "model.layers.0.self_attn.v_proj"),
        ({r"^model\.layers\.0.*": 1, "v_proj": 3}, "model.layers.0.self_attn.v_proj"),
        ({r"layers\.(0|2)\.self_attn.*": 1, ".*": 3}, "model.layers.1.self_attn.v_proj"),
        ({r"^layers\.0.*": 1}, "model.layers.0.v_proj"),
    ],
)
def test_patterns_fit_as_in_peft(patterns: dict[str, int], module: str) -> None:
    from peft.utils.other import get_pattern_key

    expected = patterns.get(get_pattern_key(list(patterns), module), 7)
    assert by_pattern(patterns, module, 7, "here") == expected
