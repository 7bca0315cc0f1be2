"""One network emits all experts: HypeLoRA. Run: pytest tests/experts/test_hypelora.py"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import moa
from moa.errors import ConfigError
from moa.experts import LoRABank
from tests import laws, models
from tests.laws import assert_close
from tests.recipes import recipe_laws

from .bank_laws import random_routing

SMALL: dict[str, Any] = {"width": 8, "d_embedding": 5, "rank": 2}


def built(router: str = "topk", **options: Any) -> Any:
    return moa.build(models.llama(), router, n_experts=4, expert="hypelora", **{**SMALL, **options})


def test_the_factors_are_the_formula() -> None:
    """down and up of an embedding through linear layers and exact GELUs, in numpy."""
    bank: Any = laws.make_bank("hypelora", "default", 6, 7, 3, 2)
    hidden = bank.embedding.detach().numpy()
    first = bank.network.trunk[0]
    hidden = hidden @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    for found, name in zip(bank.factors(), ("down_2x6", "up_2x7"), strict=True):
        last = bank.network.last[name]
        expected = (hidden @ last.weight.detach().numpy().T + last.bias.detach().numpy()).reshape(found.shape)
        assert_close(found, torch.from_numpy(expected))
    kept = LoRABank(6, 7, 3, rank=2, scaling=bank.scaling).double()
    with torch.no_grad():
        for target, factor in zip((kept.down, kept.up), bank.factors(), strict=True):
            target.copy_(factor)
        x, routing = torch.randn(2, 3, 6, dtype=torch.float64), random_routing((2, 3), 3, 2)
        assert_close(bank(x, routing), kept(x, routing), what="experts kept as LoRAs")
        bank.embedding[1] = bank.embedding[0]
        down, up = bank.factors()
    assert_close(down[0], down[1], what="one embedding, one expert")
    assert_close(up[0], up[1])
    assert not torch.allclose(down[0], down[2], atol=0.1)


def test_layers_cost_an_embedding_each(tmp_path: Path) -> None:
    """Of one network, saved once, whatever the number of layers."""
    counts = []
    for layers in (1, 3):
        base = models.llama(num_hidden_layers=layers)
        model = moa.build(base, "fixed", n_experts=4, expert="hypelora", targets="attention", **SMALL)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        assert len(model.mixtures()) == 4 * layers
    assert counts[1] - counts[0] == 2 * 4 * 4 * SMALL["d_embedding"]
    models.randomise(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = [name for name in saved if not name.startswith("shared_by_experts.0.")]
    assert sum(name.endswith(".embedding") for name in own) == 4 * layers
    assert not any("network" in name for name in own)


@pytest.mark.parametrize("down", ["generated", "frozen"])
def test_the_laws_of_recipes_hold(down: str, tmp_path: Path) -> None:
    options = {"n_experts": 4, "expert": "hypelora", "down": down, "targets": "attention", **SMALL}
    subject = recipe_laws.Subject(moa.make_recipe("topk", **options))
    recipe_laws.trains_only_what_it_adds(subject)
    recipe_laws.saves_bit_for_bit(subject, tmp_path)
    recipe_laws.copies_apart(subject)
    recipe_laws.reaches_every_parameter(recipe_laws.Subject(moa.make_recipe("dense", **options)))
    recipe_laws.folds_as_declared(recipe_laws.Subject(moa.make_recipe("fixed", **options)))


def test_places_that_see_other_sizes_have_layers_of_their_own() -> None:
    model = models.randomise(built(place="output"))
    model.train()(**models.lm_batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_frozen_downs_are_of_the_seed_and_not_saved(tmp_path: Path) -> None:
    model = models.randomise(built(down="frozen", seed=3))
    bank: Any = next(branch.bank for _, branch in model.branches())
    assert not bank.down.requires_grad and 0.8 < bank.down.abs().max() * math.sqrt(bank.d_in) <= 1
    assert not any(name.endswith(".down") for name in model.adapter_state_dict())
    assert not any(name.startswith("down") for name in bank.network.last)
    other: Any = next(branch.bank for _, branch in built(down="frozen", seed=4).branches())
    assert not torch.equal(other.down, bank.down)


def test_an_expert_more_or_less_leaves_the_network() -> None:
    model = models.randomise(built())
    batch = {"input_ids": models.lm_batch()["input_ids"]}
    with model.pin_expert(1):
        before = models.outputs_of(model, batch)
    model.remove_expert(0)
    with model.pin_expert(0):
        assert_close(models.outputs_of(model, batch), before, 1e-5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"depth": 1}, "depth must be at least 2, got 1"),
        ({"width": 0}, "width must be at least 1"),
        ({"down": "random"}, "down must be 'generated' or 'frozen', got 'random'"),
    ],
)
def test_bad_input(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        moa.make_recipe("topk", expert="hypelora", **options)


def test_experts_that_exist_cannot_be_read_into_a_network() -> None:
    bank = moa.make_recipe("topk", expert="hypelora", **SMALL).bank(moa.Site("l", nn.Linear(4, 4), 4, 4))
    with pytest.raises(ConfigError, match="HypeLoRABank experts cannot hold"):
        bank.read(0, LoRABank(4, 4, 1, rank=2).delta(0))
