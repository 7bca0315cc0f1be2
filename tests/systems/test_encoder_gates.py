"""Expert choice and soft slots against their papers' algorithms. Run: pytest tests/systems/test_encoder_gates.py"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moa
from moa.errors import ConfigError, ContextError, FoldError
from moa.mixture.mixture import Mixture
from moa.recipes import Site
from tests import models
from tests.laws import assert_close


def make(name: str, mask: Tensor | None = None, **options: Any) -> Mixture:
    base = nn.Linear(10, 7).double().requires_grad_(False)
    recipe = moa.make_recipe(name, **{"n_experts": 4, "rank": 2, **options})
    context = moa.Context(masks=() if mask is None else (mask,))
    mixture = Mixture(base, recipe.build(Site("layer", base, 10, 7)), context, "layer").double()
    for parameter in mixture.branches.parameters():
        nn.init.normal_(parameter)
    return mixture.eval()


LENGTHS = [6, 4, 1]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Three examples of unlike length: x (3, 6, 10) and their mask (3, 6)."""
    mask = torch.arange(6)[None] < torch.tensor(LENGTHS)[:, None]
    return torch.randn(3, 6, 10, dtype=torch.float64), mask


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0, 8.0])
def test_experts_choose_their_best_rows(batch: tuple[Tensor, Tensor], capacity: float) -> None:
    x, mask = batch
    mixture = make("expert_choice", mask, capacity=capacity)
    branch = mixture.branches[0]
    expected = mixture.base(x).clone()
    for b, n in enumerate(LENGTHS):
        scores = torch.softmax(x[b, :n] @ branch.router.weight.T, -1)
        takes = min(n, math.ceil(capacity * n / 4))
        for e in range(4):
            values, rows = scores[:, e].topk(takes)
            expected[b, rows] += values[:, None] * branch.bank.expert_forward(x[b, rows], e)
    assert_close(mixture(x), expected)


def test_the_load_is_even_without_a_loss(batch: tuple[Tensor, Tensor]) -> None:
    x, mask = batch
    routing = make("expert_choice", mask).branches[0].router(x, moa.Context(masks=(mask,)))
    counts = routing.selected().sum(1)
    for b, n in enumerate(LENGTHS):
        assert counts[b].tolist() == [min(n, math.ceil(2 * n / 4))] * 4
    assert not routing.selected()[~mask].any(), "padding is taken"


@pytest.mark.parametrize("n_slots", [1, 3])
def test_soft_slots_are_the_papers(batch: tuple[Tensor, Tensor], n_slots: int) -> None:
    x, mask = batch
    mixture = make("soft", mask, n_slots=n_slots)
    router, bank = mixture.branches[0].router, mixture.branches[0].bank
    y = mixture(x)
    for b, n in enumerate(LENGTHS):
        row = x[b, :n]
        unit = row / row.norm(dim=1, keepdim=True)
        mu = router.slots / router.slots.norm(dim=1, keepdim=True)
        logits = router.scale * unit @ mu.T
        dispatch, combine = torch.softmax(logits, 0), torch.softmax(logits, 1)
        slots = dispatch.T @ row
        outs = torch.cat([bank.expert_forward(slots[e * n_slots : (e + 1) * n_slots], e) for e in range(4)])
        assert_close(y[b, :n], mixture.base(row) + combine @ outs)


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_padding_and_other_examples_change_nothing(batch: tuple[Tensor, Tensor], name: str) -> None:
    x, mask = batch
    mixture = make(name, mask)
    together = mixture(x)
    mixture.context.masks = ()
    for b, n in enumerate(LENGTHS):
        assert_close(mixture(x[b : b + 1, :n]), together[b : b + 1, :n])


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_decoding_and_folding_are_refused(name: str) -> None:
    model = moa.build(models.llama(), name, n_experts=4, rank=2)
    with pytest.raises(ContextError, match="not causal"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(FoldError, match="layers"):
        model.merge_and_unload()


@pytest.mark.parametrize("name", ["expert_choice", "soft"])
def test_encoders_train(name: str) -> None:
    model, batch = moa.build(models.bert(), name, n_experts=4, rank=2), models.class_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_bad_inputs() -> None:
    with pytest.raises(ConfigError, match="capacity must be positive"):
        moa.make_recipe("expert_choice", capacity=0.0)
    with pytest.raises(ConfigError, match="n_slots must be at least 1"):
        moa.make_recipe("soft", n_slots=0)
