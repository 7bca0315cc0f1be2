"""Few rows without gradients, as in decoding: their own way through the ops.

Run: pytest tests/kernels/test_few_rows.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moa.errors import ShapeError
from moa.kernels import Gate, gated_linear, low_rank_mixture, mixture_linear

from .compare import make_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def tolerance(exact: torch.Tensor, dtype: torch.dtype) -> float:
    roundings = 2 if dtype == torch.bfloat16 else 16  # its sums are formed in fp32
    return roundings * torch.finfo(dtype).eps * float(exact.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 5, 64, 65])
def test_equals_the_training_forward(n_rows, k, dtype):
    case = make_case((n_rows,), d_in=32, d_out=16, k=k).to(dtype, torch.float32)
    weight, bias = torch.randn(16, 32).to(dtype), torch.randn(16).to(dtype)
    routed = (case.a, case.b, case.weights, case.indices)
    exact = low_rank_mixture(
        case.x.double(), *(v if v is None or v.dtype == torch.int64 else v.double() for v in routed)
    )
    base = F.linear(case.x.double(), weight.double())
    for engine in (None, "concat", "sorted"):
        alone = low_rank_mixture(case.x, *routed, engine=engine)
        plain = mixture_linear(case.x, weight, None, *routed, engine=engine)
        shifted = mixture_linear(case.x, weight, bias, *routed, engine=engine)
        trained = mixture_linear(case.x.clone().requires_grad_(), weight, bias, *routed, engine=engine)
        for y, truth in (
            (alone, exact),
            (plain, exact + base),
            (shifted, exact + base + bias.double()),
            (trained.detach(), exact + base + bias.double()),
        ):
            assert y.dtype == dtype
            assert y.shape == (n_rows, 16)
            if n_rows:
                assert (y - truth).abs().max() <= tolerance(truth, dtype)
                wrong = y + 0.05 * truth.abs().max()
                assert not (wrong - truth).abs().max() <= tolerance(truth, dtype)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_strided_factors(n_rows):
    case = make_case((n_rows,)).to(torch.float32)
    a, b = (value.mT.contiguous().mT for value in (case.a, case.b))
    expected = low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices)
    torch.testing.assert_close(low_rank_mixture(case.x, a, b, case.weights, case.indices), expected)


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_of_no_expert_is_refused(n_rows, wrong):
    case = make_case((n_rows,)).to(torch.float32)
    case.indices[-1, 1] = wrong
    with pytest.raises(ShapeError, match=r"experts 0 … 3"):
        low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices)


def test_one_row_reads_its_own_experts_alone():
    case = make_case((1,)).to(torch.float32)
    case = replace(case, indices=torch.tensor([[2, 0]]))
    expected = low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices)
    for parameter in (case.a, case.b):
        parameter[[1, 3]] = torch.nan
    torch.testing.assert_close(low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices), expected)
    case.a[2] = torch.nan
    assert low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices).isnan().all()


@pytest.mark.parametrize("n_rows", [1, 3])
def test_an_overflow_where_the_weight_is_zero_stays_out(n_rows):
    case = make_case((n_rows,)).to(torch.float32)
    indices = torch.tensor([[0, 1]]).expand(n_rows, 2).contiguous()
    weights = torch.tensor([[0.0, 1.0]]).expand(n_rows, 2).contiguous()
    expected = low_rank_mixture(case.x, case.a, case.b, weights, indices)
    case.a[0] = torch.finfo(torch.float32).max
    assert torch.isinf(case.x @ case.a[0].T).any()
    torch.testing.assert_close(low_rank_mixture(case.x, case.a, case.b, weights, indices), expected)
    assert not low_rank_mixture(case.x, case.a, case.b, weights.flip(-1), indices).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", [1, 5, 9])
def test_a_gate_chooses_the_same_with_and_without_gradients(n_rows, dtype):
    case = make_case((n_rows,), d_in=32, d_out=16).to(dtype, torch.float32)
    weight, gate = torch.randn(16, 32).to(dtype), torch.randn(4, 32)
    y, *routing = gated_linear(case.x.clone().requires_grad_(), weight, None, Gate(gate, 2), case.a, case.b, 0.5)
    with torch.no_grad():
        found, *again = gated_linear(case.x, weight, None, Gate(gate, 2), case.a, case.b, 0.5)
    torch.testing.assert_close(found, y.detach())
    for one, other in zip(routing, again, strict=True):
        torch.testing.assert_close(one.detach(), other)
