"""The reference against the definition in scalar loops. Run: pytest tests/kernels/test_reference.py"""

from __future__ import annotations

import pytest
import torch

from moa.kernels.reference import low_rank_mixture_reference

from .compare import make_case, results, truth


@pytest.mark.parametrize("k", [1, 2, 4, None])
def test_equals_the_formula_row_by_row(k):
    case = make_case((5,), k=k)
    expected = torch.zeros(5, 7, dtype=torch.float64)
    for t in range(5):
        for j in range(case.weights.shape[-1]):
            e = j if case.indices is None else int(case.indices[t, j])
            expected[t] += case.weights[t, j] * (case.a[e] @ case.x[t]) @ case.b[e]
    torch.testing.assert_close(truth(case)[0], expected, rtol=0, atol=1e-12)


def test_a_repeated_expert_adds():
    case = make_case((5,))
    repeated = torch.zeros_like(case.indices)
    one = low_rank_mixture_reference(case.x, case.a, case.b, case.weights, repeated)
    two = low_rank_mixture_reference(case.x, case.a, case.b, case.weights.sum(-1, keepdim=True), repeated[:, :1])
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    case = make_case((3,), (1,))
    leaves = [v.clone().requires_grad_() for v in (case.x, case.a, case.b, case.weights)]
    assert torch.autograd.gradcheck(lambda *t: low_rank_mixture_reference(*t, case.indices), leaves)
    assert len(results(low_rank_mixture_reference, case)) == 5
