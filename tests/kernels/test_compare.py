"""The comparison helpers fail on wrong values. Run: pytest tests/kernels/test_compare.py"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moa.kernels.reference import low_rank_mixture_reference

from .compare import NAMES, assert_same, assert_three_way, make_case, results, truth


@pytest.fixture
def right() -> tuple[torch.Tensor, ...]:
    return truth(make_case((12,)))


def test_equal_results_pass(right):
    assert_same(right, right)
    assert_three_way(right, right, right, eps=0.0)


@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
@pytest.mark.parametrize("wrong", [float("nan"), 0.0, 1.01], ids=["nan", "zeroed", "one percent"])
def test_one_wrong_element_fails(right, which, wrong):
    bad = [value.clone() for value in right]
    flat = bad[which].view(-1)
    largest = flat.abs().argmax()
    flat[largest] = flat[largest] * wrong
    with pytest.raises(AssertionError, match=NAMES[which]):
        assert_same(bad, right)
    with pytest.raises(AssertionError, match=NAMES[which]):
        assert_three_way(bad, right, right, eps=1e-3)


def test_wrong_shape_fails(right):
    bad = [right[0][:, :1], *right[1:]]
    with pytest.raises(AssertionError, match="shape"):
        assert_same(bad, right)
    with pytest.raises(AssertionError, match="shape"):
        assert_three_way(bad, right, right, eps=1e-3)


def test_bf16_rounding_passes_and_a_dropped_slot_fails():
    case = make_case((64,), d_in=48, d_out=40, n_experts=8, rank=4).to(torch.bfloat16, torch.float32)
    exact, plain = truth(case), results(low_rank_mixture_reference, case)
    assert_three_way(plain, plain, exact, eps=1e-3)
    dropped = results(low_rank_mixture_reference, replace(case, weights=case.weights * torch.tensor([1.0, 0.0])))
    with pytest.raises(AssertionError, match="relative error"):
        assert_three_way(dropped, plain, exact, eps=1e-3)
