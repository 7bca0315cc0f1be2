"""What a mixture is compared with: the probe, the matching rank, picking.

Run: pytest tests/runs/test_baselines.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import moa
from moa.errors import ConfigError
from moa.runs.baselines import LinearProbe, active_parameters, held_out, matching_rank, pick, probe
from tests.models import llama


def tasks(**n_labels: int) -> Any:
    """Return what the probe reads of tasks: those of one label are regressions."""
    kinds = {1: "regression"}
    return [
        SimpleNamespace(name=name, kind=kinds.get(n, "classification"), labels=[str(i) for i in range(n)])
        for name, n in n_labels.items()
    ]


def test_the_probe_of_numbers_is_ridge_regression() -> None:
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double()
    truth = (features @ torch.tensor([1.0, -2.0, 0.5, 0.0]).double() + 3).float()
    ids = torch.zeros(60, dtype=torch.long)
    fitted = LinearProbe(tasks(a=1), (features.float(), ids, truth[:, None]), l2=0.2)
    x = ((features - features.mean(0)) / features.std(0)).numpy()
    # sklearn's Ridge with alpha = n · l2 / 2 minimises the same; its closed form on centred targets
    weight = np.linalg.solve(x.T @ x + 60 * 0.1 * np.eye(4), x.T @ (truth.numpy() - truth.numpy().mean()))
    np.testing.assert_allclose(fitted.heads.weight.detach().numpy().ravel(), weight, rtol=1e-3, atol=1e-3)
    scores = fitted.score((features.float(), ids, truth[:, None]))["a"]
    guess = x @ weight + truth.numpy().mean()
    assert scores["rmse"] == pytest.approx(float(np.sqrt(((guess - truth.numpy()) ** 2).mean())), rel=1e-2)


def rows(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features whose sign along a direction of each task's own is the label."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 6, generator=generator) * 3 + 1
    ids = torch.arange(n) % 2
    labels = torch.where(ids == 0, features[:, 0] > 1, features[:, 1] < 1).long()
    return features, ids, labels


def test_the_probe_learns_a_separable_problem_per_task() -> None:
    scores, about = probe(tasks(a=2, b=3), rows(200, 0), rows(100, 1), [0.001, 1.0], 0.2, seed=0)
    assert all(row["accuracy"] > 0.9 for row in scores.values())
    assert about["l2"] == 0.001
    assert [row["value"] for row in about["tried"]] == [0.001, 1.0]


def test_the_probe_is_at_the_optimum() -> None:
    features, ids, labels = rows(100, 0)
    fitted = LinearProbe(tasks(a=2, b=2), (features, ids, labels), l2=0.1)
    x = (features - features.mean(0)) / features.std(0)
    weight = fitted.heads.weight.detach().clone().requires_grad_()
    bias = fitted.heads.bias.detach().clone().requires_grad_()
    logits = torch.einsum("bd,bcd->bc", x, weight[ids]) + bias[ids]
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.05 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(float(g.abs().max()) for g in gradients) < 1e-3


def test_active_parameters_and_matching_rank() -> None:
    model = moa.build(llama(), "topk", n_experts=8, k=2, rank=4, targets="all-linear")
    per_rank = sum(m.branches[0].bank.d_in + m.branches[0].bank.d_out for m in model.mixtures().values())
    assert active_parameters(model) == 2 * 4 * per_rank
    assert matching_rank(model) == 8
    lora = moa.build(llama(), "fixed", n_experts=1, rank=8, targets="all-linear")
    assert active_parameters(lora) == active_parameters(model)


def test_held_out_rows_part_all_rows() -> None:
    kept, left = held_out(10, 0.2, seed=0)
    assert sorted(kept + left) == list(range(10)) and len(left) == 2
    assert held_out(10, 0.2, seed=0) == (kept, left) != held_out(10, 0.2, seed=1)
    assert len(held_out(2, 0.01, seed=0)[1]) == 1
    with pytest.raises(ConfigError, match="at least 2 training rows"):
        held_out(1, 0.5, seed=0)


def test_pick_takes_the_best_accuracy_then_the_lowest_loss() -> None:
    table = {1.0: (0.5, 0.1), 2.0: (0.9, 0.3), 3.0: (0.9, 0.2)}
    best, tried = pick(list(table), lambda v: {"a": {"accuracy": table[v][0], "loss": table[v][1]}})
    assert best == 3.0
    assert tried[1] == {"value": 2.0, "accuracy": 0.9, "loss": 0.3}
