"""Experts switched in the base's weights, and sparse entries chosen by gradient. Run: pytest tests/model"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moa
from moa.errors import ConfigError, FoldError
from moa.model.hot_switch import hot_switch
from moa.training.sparse_entries import choose_entries
from tests import models
from tests.laws import assert_close


def sparse(make: Any = models.llama, **options: Any) -> Any:
    model = moa.build(make(), "topk", n_experts=3, k=1, expert="shira", **{"density": 0.1, **options})
    return models.randomise(model).eval()


@pytest.mark.parametrize("make", [models.llama, models.gpt2], ids=["linear", "conv1d"])
def test_a_switch_gives_each_expert_and_the_base_back_bit_for_bit(make: Any) -> None:
    model, batch = sparse(make), models.lm_batch()
    before = {name: t.clone() for name, t in model.base.state_dict().items()}
    plain = models.outputs_of(make(), batch)
    pinned = []
    for expert in range(3):
        with model.pin_expert(expert):
            pinned.append(models.outputs_of(model, batch))
    with hot_switch(model) as switch:
        for expert in (0, 2, 1, 2):
            switch.to(expert)
            assert_close(models.outputs_of(model, batch), pinned[expert], 1e-5)
        switch.to(None)
        assert torch.equal(models.outputs_of(model, batch), plain)
        with pytest.raises(ConfigError, match="expert 3 does not exist"):
            switch.to(3)
        switch.to(1)
    for name, value in model.base.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} is not as it was"


def test_only_the_entries_of_a_sparse_expert_are_written_and_kept() -> None:
    model = sparse()
    with hot_switch(model) as switch:
        switch.to(0)
        kept = sum(undo.values.numel() for undo in switch._undo)
        assert kept == sum(branch.bank.values.shape[1] for _, branch in model.branches())


def test_an_error_in_the_block_leaves_the_base_as_it_came() -> None:
    model = sparse()
    plain = models.outputs_of(models.llama(), models.lm_batch())
    with pytest.raises(ValueError, match="stop"), hot_switch(model) as switch:
        switch.to(0)
        raise ValueError("stop")
    with model.disable_adapter():
        assert torch.equal(models.outputs_of(model, models.lm_batch()), plain)
    with hot_switch(model) as switch:
        switch.to(1)
        now = models.outputs_of(model, models.lm_batch())
        with model.disable_adapter():
            assert torch.equal(models.outputs_of(model, models.lm_batch()), plain)
        assert torch.equal(models.outputs_of(model, models.lm_batch()), now) and not torch.equal(now, plain)
    blocks = moa.build(models.llama(), "topk", place="block")
    with pytest.raises(FoldError, match="has no weight to write an expert into"), hot_switch(blocks):
        pass


@pytest.mark.parametrize("by", ["gradient", "snip"])
def test_entries_are_those_of_the_largest_gradient(by: str) -> None:
    model = moa.build(models.llama(), "fixed", n_experts=2, expert="shira", mask="given", density=0.1)
    batch = models.lm_batch()
    choose_entries(model, [batch], by)
    base = models.llama()
    base(**batch).loss.backward()
    name, mixture = next(iter(model.mixtures().items()))
    weight = base.get_submodule(name).weight
    score = (weight.grad * weight if by == "snip" else weight.grad).abs().flatten()
    (branch,) = mixture.branches
    n = branch.bank.places.shape[1]
    assert set(branch.bank.places.flatten().tolist()) == set(score.topk(2 * n).indices.tolist())
    assert not any(p.requires_grad for p in mixture.base.parameters())
    assert int(branch.bank.overlap()[0, 1]) == 0 and int(branch.bank.overlap()[0, 0]) == n


def test_entries_by_gradient_are_stored(tmp_path: Any) -> None:
    model = moa.build(models.llama(), "fixed", n_experts=2, expert="shira", mask="given", density=0.1)
    choose_entries(model, [models.lm_batch()])
    models.randomise(model).save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama())
    assert torch.equal(models.outputs_of(again, models.lm_batch()), models.outputs_of(model, models.lm_batch()))


def test_what_has_no_entries_to_choose_is_named() -> None:
    with pytest.raises(ConfigError, match="no experts of the family 'shira'"):
        choose_entries(moa.build(models.llama(), "fixed"), [models.lm_batch()])
    with pytest.raises(ConfigError, match="build with mask='given'"):
        choose_entries(sparse(), [models.lm_batch()])
    with pytest.raises(ConfigError, match="no batch was given"):
        choose_entries(sparse(mask="given"), [])


def test_random_places_overlap_as_chance_has_it() -> None:
    """n² / (o i) shared places on average; a change of more than r ranks from as many numbers as a LoRA's."""
    model = moa.build(
        torch.nn.Sequential(torch.nn.Linear(256, 256)), "fixed", n_experts=2, expert="shira", rank=2, targets=("0",)
    )
    bank: Any = next(branch.bank for _, branch in model.branches())
    models.randomise(model)
    assert bank.values.shape[1] == 2 * 512
    assert abs(int(bank.overlap()[0, 1]) - 16) < 14
    assert int(torch.linalg.matrix_rank(bank.delta(0).dense().double())) > 200
