"""Selection functions against independent numpy loops. Run: pytest tests/routers/test_select.py"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moa.routers import select

from ..laws import assert_close


def mixtral_loop(logits: np.ndarray, k: int) -> np.ndarray:
    """Return the dense weights (T, E) of Mixtral's gate, one row and one expert at a time."""
    out = np.zeros_like(logits)
    for t, row in enumerate(logits):
        p = np.exp(row - row.max())
        p /= p.sum()
        best = sorted(range(len(row)), key=lambda e: -p[e])[:k]
        total = sum(p[e] for e in best)
        for e in best:
            out[t, e] = p[e] / total
    return out


def scatter(weights: torch.Tensor, indices: torch.Tensor, n_experts: int) -> torch.Tensor:
    return weights.new_zeros(*weights.shape[:-1], n_experts).scatter(-1, indices, weights)


@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (5, 1), (4, 4), (1, 1)])
def test_top_k_is_the_gate_of_mixtral(n_experts, k):
    logits = torch.randn(50, n_experts, dtype=torch.float64) * 2
    weights, indices = select.top_k(logits.softmax(-1), k)
    assert_close(scatter(weights, indices, n_experts), torch.from_numpy(mixtral_loop(logits.numpy(), k)))
    other, chosen = select.softmax_top_k(logits, k)
    assert_close(scatter(other, chosen, n_experts), scatter(weights, indices, n_experts))


def test_not_renormalised_keeps_the_scores():
    scores = torch.tensor([[0.1, 0.6, 0.3]])
    weights, indices = select.top_k(scores, 2, renormalize=False)
    assert indices.tolist() == [[1, 2]]
    assert torch.equal(weights, torch.tensor([[0.6, 0.3]]))


def test_the_bias_chooses_but_does_not_weigh():
    scores = torch.tensor([[0.5, 0.4, 0.1]], requires_grad=True)
    weights, indices = select.top_k(scores, 2, bias=torch.tensor([0.0, 0.0, 1.0]))
    assert indices.tolist() == [[2, 0]]
    assert_close(weights, torch.tensor([[1 / 6, 5 / 6]]), 1e-6)
    weights[0, 0].backward()
    assert scores.grad is not None and scores.grad[0, 1] == 0


def test_scores_that_underflow_give_finite_weights():
    weights, _ = select.top_k(torch.zeros(1, 4), 2)
    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_selection_probability_is_the_frequency_over_own_noise(k):
    """With the others' noise held fixed, an expert's own noise drawn again keeps it in the top k that often."""
    clean = torch.tensor([0.3, -0.2, 0.6, 0.1], dtype=torch.float64)
    std = torch.tensor([0.5, 1.0, 0.7, 0.2], dtype=torch.float64)
    noisy = clean + std * torch.randn(4, dtype=torch.float64)
    got = select.selection_probability(clean, noisy, std, k)
    for e in range(4):
        redrawn = noisy.repeat(200_000, 1)
        redrawn[:, e] = clean[e] + std[e] * torch.randn(200_000, dtype=torch.float64)
        frequency = (redrawn.topk(k, -1).indices == e).any(-1).double().mean()
        assert abs(frequency - got[e]) < 4 * (0.25 / 200_000) ** 0.5
    assert torch.equal(select.selection_probability(clean, noisy, std, 4), torch.ones_like(clean))
