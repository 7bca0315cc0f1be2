"""Sizes that no machine has are refused before memory is taken. Run: pytest tests/model/test_room.py"""

from __future__ import annotations

import dataclasses
import resource
from typing import Any

import pytest
import torch

import moa
from moa.errors import ConfigError
from moa.experts import FAMILIES
from moa.model import room
from moa.recipes import RECIPES
from tests import laws, models

HUGE = 10**8
FREE = 2**32  # bytes
KEYS = ("n_experts", "rank", "n_slots", "n_tasks", "d_embedding")
SIZES = {"n", "width", "n_factors"}  # keywords of families
BOUNDED = {("lokr", "rank")}  # a rank above the factors' size makes them whole
CASES: list[dict[str, Any]] = [
    {"router": name, key: HUGE}
    for name, row in RECIPES.items()
    if not row.wants_experts
    for key in KEYS
    if key in {field.name for field in dataclasses.fields(row)}
]
CASES += [
    {"router": "moelora", "n_tasks": 2, "expert": name, key: HUGE}
    for name, row in FAMILIES.items()
    for key in ("n_experts", *sorted({"rank"} & {*row.uses} | SIZES & {f.name for f in dataclasses.fields(row)}))
    if (name, key) not in BOUNDED
]
CASES += [{"router": "topk", "rank": [2, 4], "n_experts": HUGE}, {"router": "topk", "rank": 2, "n_experts": 2**62}]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have 4 GiB."""
    monkeypatch.setattr(room, "free_bytes", lambda device: FREE)


@pytest.mark.parametrize("keywords", CASES, ids=str)
def test_a_size_that_no_machine_has(keywords: dict[str, Any], small: None) -> None:
    model = models.llama(num_hidden_layers=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError):
        moa.build(model, **keywords)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "more than 256 MiB were taken"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_message_counts(small: None) -> None:
    said = r"would take 51,200,000,000 bytes \(47.7 GiB\) or more on 7 layers, and cpu has 4.0 GiB free"
    with pytest.raises(ConfigError, match=said):
        moa.build(models.llama(num_hidden_layers=1), "topk", rank=HUGE)


@laws.parametrize(laws.RECIPE_CASES)
def test_what_is_counted_is_what_is_built(name: str, variant: str) -> None:
    """Over every recipe: the bytes counted without tensors are those of the model that is built."""
    recipe = laws.small_recipe(name, variant)
    model = moa.build(models.llama(), recipe)
    modules = [m.branches for m in model.mixtures().values()] + [*model.shared_by_layers.values()]
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers())}.values()
    plain = models.llama()
    counted = room.bytes_of(recipe.for_base(plain), recipe.for_base(plain).sites(plain), model.scope, FREE)
    assert counted == sum(t.numel() * t.element_size() for t in tensors)


def test_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    free = room.free_bytes(torch.device("cpu"))
    assert free is not None and 2**20 < free < 2**50
    monkeypatch.setattr(room, "GROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert room.free_bytes(torch.device("cpu")) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert (room.free_bytes(torch.device("cpu")) or 0) > 2**20
    assert room.free_bytes(torch.device("meta")) is None
