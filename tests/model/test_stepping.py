"""Routers step once per optimizer step, whatever the optimizer holds. Run: pytest tests/model/test_stepping.py"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import moa
from moa.objective import exchange
from tests import models

RATE, STEPS = 0.01, 4
Parameters = list[torch.nn.Parameter]


def build() -> moa.MoAModel:
    return moa.build(models.llama(), "sigmoid", n_experts=4, k=1, rank=2, bias_rate=RATE).train()


class Held:
    """An optimizer of the parameters themselves."""

    def __init__(self, own: Parameters) -> None:
        self.own, self.held = own, self.copies(own)
        self.optimizer = torch.optim.SGD(self.held, lr=0.01)

    def copies(self, own: Parameters) -> list[Tensor]:
        return list(own)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Masters(Held):
    """fp32 copies, written back past autograd's counters."""

    def copies(self, own: Parameters) -> list[Tensor]:
        return [p.detach().clone() for p in own]

    def step(self) -> None:
        for held, p in zip(self.held, self.own, strict=True):
            held.grad, p.grad = p.grad, None
        self.optimizer.step()
        for held, p in zip(self.held, self.own, strict=True):
            p.data.copy_(held)


class Partitions(Held):
    """Flat partitions, each stepped by itself and then written back, as sharded engines do."""

    def copies(self, own: Parameters) -> list[Tensor]:
        return list(torch.cat([p.detach().flatten() for p in own]).chunk(2))

    def step(self) -> None:
        grads = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.own])
        for held, grad in zip(self.held, grads.chunk(2), strict=True):
            self.optimizer.param_groups[0]["params"] = [held]
            held.grad = grad
            self.optimizer.step()
            flat = torch.cat(self.held)
            for p, part in zip(self.own, flat.split([p.numel() for p in self.own]), strict=True):
                p.data.copy_(part.view_as(p))
        for p in self.own:
            p.grad = None


def biases(kind: type[Held], micro: int = 1, during: Callable[[moa.MoAModel], None] = lambda _: None) -> list[Tensor]:
    """Return each layer's bias (E,) after some steps of some micro-batches and a use of the model."""
    model, batch = build(), models.lm_batch()
    engine = kind([p for p in model.parameters() if p.requires_grad])
    for _ in range(STEPS):
        for _ in range(micro):
            model(**batch).loss.backward()
            during(model)
        engine.step()
    model.eval()(**batch)
    return [branch.router.selection_bias.clone() for _, branch in model.branches()]  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("kind", [Masters, Partitions])
def test_copies_step_as_parameters_do(kind: type[Held], micro: int) -> None:
    expected = biases(Held, micro)
    largest = torch.stack([bias.abs().max() for bias in expected])
    assert (largest <= STEPS * RATE + 1e-6).all() and (largest > 0).float().mean() > 0.5
    for got, want in zip(biases(kind, micro), expected, strict=True):
        assert torch.allclose(got, want)


@pytest.mark.parametrize("kind", [Held, Masters, Partitions])
def test_an_optimizer_of_something_else_is_no_step(kind: type[Held]) -> None:
    other = torch.nn.Parameter(torch.ones(2))

    def train_another(model: moa.MoAModel) -> None:
        other.grad = torch.ones(2)
        torch.optim.SGD([other], lr=0.1).step()

    for got, want in zip(biases(kind, 2, train_another), biases(Held, 2), strict=True):
        assert torch.allclose(got, want)


def test_a_step_that_is_skipped_moves_nothing() -> None:
    """A scaler that finds infinities does not call the optimizer."""
    model, batch = build(), models.lm_batch()
    engine = Masters([p for p in model.parameters() if p.requires_grad])
    model(**batch).loss.backward()
    scaler = torch.amp.GradScaler("cpu")
    for held, p in zip(engine.held, engine.own, strict=True):
        held.grad = torch.full_like(p, float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(engine.optimizer)
    model(**batch)
    assert all(not branch.router.selection_bias.any() for _, branch in model.branches())  # type: ignore[operator, union-attr]


def test_a_last_step_is_in_the_checkpoint(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = build()
    engine = Masters([p for p in model.parameters() if p.requires_grad])
    model(**models.lm_batch()).loss.backward()
    engine.step()
    model.save_pretrained(tmp_path)
    again = moa.load(tmp_path, base=models.llama())
    assert all(branch.router.selection_bias.any() for _, branch in again.branches())  # type: ignore[operator, union-attr]


def test_an_unloaded_model_that_is_still_held_leaves_other_optimizers_alone() -> None:
    model = moa.build(models.llama(num_hidden_layers=1), "topk")
    batch = models.lm_batch()
    model.train()(**batch).loss.backward()
    model.unload()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    before = other.weight.detach().clone()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not torch.equal(other.weight, before)


def test_the_counts_of_all_routers_are_one_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, the other of which sent 1000 rows to the first expert: every router moves by their sum."""
    model = moa.build(models.llama(), "sigmoid", n_experts=4, k=2, bias_rate=0.1, targets="all-linear").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model(**models.lm_batch()).loss.backward()
    routers = [branch.router for _, branch in model.branches()]
    expected = [router.counts.clone() for router in routers]
    sizes: list[int] = []

    def add_the_other(total: torch.Tensor) -> None:
        sizes.append(total.numel())
        total.view(-1, 4)[:, 0] += 1000

    monkeypatch.setattr(exchange, "is_shared", lambda: True)
    monkeypatch.setattr(exchange.distributed, "all_reduce", add_the_other)
    optimizer.step()
    assert sizes == [4 * len(routers)] and len(routers) == 14
    for router, counts in zip(routers, expected, strict=True):
        counts[0] += 1000
        torch.testing.assert_close(router.selection_bias, 0.1 * torch.sign(counts.mean() - counts))
        assert not router.counts.any()
