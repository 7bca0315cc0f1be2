"""The plan of grouped engines. Run: pytest tests/kernels/test_plan.py"""

from __future__ import annotations

import pytest
import torch

from moa.kernels.plan import sort_slots


@pytest.mark.parametrize(("n_rows", "n_experts", "k"), [(0, 4, 2), (1, 1, 1), (37, 5, 3), (16, 8, 8)])
def test_every_slot_lies_in_its_experts_span(n_rows, n_experts, k):
    indices = torch.rand(n_rows, n_experts).topk(k, dim=-1).indices
    plan = sort_slots(indices, n_experts)
    flat = indices.flatten()
    assert plan.offsets[0] == 0 and plan.offsets[-1] == n_rows * k
    for expert in range(n_experts):
        slots = plan.order[plan.offsets[expert] : plan.offsets[expert + 1]]
        assert (flat[slots] == expert).all()
        assert slots.numel() == (flat == expert).sum()
        assert (slots.diff() > 0).all()  # stable: rows ascend, so sums have one order
    assert torch.equal(plan.order[plan.place], torch.arange(n_rows * k))
    assert torch.equal(plan.rows, plan.order // k)


def test_an_empty_expert_has_an_empty_span():
    plan = sort_slots(torch.tensor([[0, 3], [3, 0]]), 5)
    assert plan.offsets.tolist() == [0, 2, 2, 2, 4, 4]
