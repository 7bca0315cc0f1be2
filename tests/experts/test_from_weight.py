"""Experts made of the base's weight, which gives their frozen tensors again. Run: pytest tests/experts"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moa
from moa.errors import ConfigError
from tests import laws, models
from tests.laws import assert_close


def bank_on(weight: torch.Tensor, name: str, n_experts: int = 2, rank: int = 2, **keywords: Any) -> Any:
    """Return a fresh bank in fp64 on a layer with a weight (o, i)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    site = moa.Site("q", layer, weight.shape[1], weight.shape[0])
    return laws.make_family(name, keywords).build(site, n_experts, None, rank=rank, scaling=1.5).double()


@pytest.mark.parametrize("sides", ["both", "input", "output"])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
def test_protected_directions_stay_as_they_are(sides: str, shape: tuple[int, int]) -> None:
    """By the definition: W0's own triplets, and for both sides those of the changed weight."""
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64)
    bank = laws.randomised(bank_on(weight, "comp_lora", protected=3, sides=sides))
    change = bank.delta(1).dense()
    u, s, vh = torch.linalg.svd(weight)
    assert change.norm() > 1 and int(torch.linalg.matrix_rank(change)) == 2
    reads, writes = (change @ vh[:3].T).abs().max(), (u[:, :3].T @ change).abs().max()
    assert (float(reads) < 1e-12) == (sides != "output") and (float(writes) < 1e-12) == (sides != "input")
    if sides == "both":
        small = weight + 0.05 * change / change.norm()
        again = torch.linalg.svd(small)
        assert_close(again.S[:3], s[:3], 1e-12)
        assert_close((again.U[:, :3] * u[:, :3]).sum(0).abs(), torch.ones(3, dtype=torch.float64), 1e-12)
        eye_o, eye_i = torch.eye(shape[0], dtype=torch.float64), torch.eye(shape[1], dtype=torch.float64)
        formula = (eye_o - u[:, :3] @ u[:, :3].T) @ bank.up[1].T @ bank.down[1] @ (eye_i - vh[:3].T @ vh[:3])
        assert_close(change, 1.5 * formula, 1e-12)


def test_a_small_layer_protects_half_of_its_directions_and_a_vector_is_refused() -> None:
    assert bank_on(torch.randn(4, 9), "comp_lora", protected=16).right.shape == (2, 9)
    with pytest.raises(ConfigError, match=r"q: a weight \(1, 9\) has one singular direction and nothing beside it"):
        bank_on(torch.randn(1, 9), "comp_lora")


def test_protected_directions_stay_in_training_with_decay() -> None:
    model, batch = moa.build(models.llama(), "topk", n_experts=3, k=2, expert="comp_lora", rank=2), models.lm_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    name, branch = next(iter(model.branches()))
    change = branch.bank.delta(0).dense()
    vh = torch.linalg.svd(model.mixtures()[name].base.weight).Vh[: branch.bank.right.shape[0]]
    assert float(change.norm()) > 1e-3 and float((change @ vh.T).abs().max()) < 1e-7
