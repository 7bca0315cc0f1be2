"""The custom ops: schema, fakes, autograd, what is saved. Run: pytest tests/kernels/test_ops.py"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from moa.kernels import dispatch, low_rank_mixture, mixture_linear
from moa.kernels.ops import backward_op, forward_op

from .compare import make_case


@pytest.mark.parametrize("k", [2, None])
@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("engine", ["", "concat", "sorted"])
def test_opcheck(k, with_base, engine):
    case = make_case((6,), k=k).to(torch.float32)
    leaves = [v.requires_grad_() for v in (case.x, case.a, case.b, case.weights)]
    base, bias = (torch.randn(7, 5), torch.randn(7)) if with_base else (None, None)
    torch.library.opcheck(forward_op, (*leaves, case.indices, base, bias, engine))


@pytest.mark.parametrize("needs", [[True] * 4, [True, False, False, True], [False, True, True, False]])
def test_opcheck_of_the_backward(needs):
    case = make_case((6,)).to(torch.float32)
    hidden = torch.randn(6, 2, 3)
    operands = (case.grad, case.x, case.a, case.b, case.weights, case.indices, hidden, None, "", needs)
    torch.library.opcheck(backward_op, operands)


@contextmanager
def saved_bytes(*ignored: torch.Tensor):
    """Count the bytes of distinct storages that autograd saves, beside those of `ignored`."""
    found: dict[int, int] = {}
    known = {value.untyped_storage().data_ptr() for value in ignored}

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


def mixture_bytes(function, dtype: torch.dtype, k: int | None = 2, needs=(True, True, True, True)) -> tuple[int, int]:
    case = make_case((256,), d_in=1024, d_out=64, n_experts=8, rank=8, k=k).to(dtype, torch.float32)
    leaves = [v.requires_grad_(need) for v, need in zip((case.x, case.a, case.b, case.weights), needs, strict=True)]
    with saved_bytes(*leaves[:3]) as found:
        y = function(*leaves, case.indices)
    assert y.requires_grad
    return sum(found.values()), case.x.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 8, None])
def test_saved_for_backward_is_rank_sized(dtype, k):
    """Exactly the hidden values of the chosen slots, fp32 weights and int64 indices; no row-sized copy."""
    saved, x_bytes = mixture_bytes(low_rank_mixture, dtype, k)
    slots = 256 * (k or 8)
    assert saved == slots * (8 * dtype.itemsize + 4 + (8 if k else 0))
    if k == 2:
        assert saved <= 0.035 * x_bytes


def test_saved_beside_the_base_is_the_same():
    weight = torch.randn(64, 1024)

    def function(x, *rest):
        return mixture_linear(x, weight, None, *rest)

    saved, x_bytes = mixture_bytes(function, torch.float32)
    assert saved - weight.nbytes <= 0.035 * x_bytes


def test_a_frozen_factor_saves_less():
    case = make_case((80,)).to(torch.float32)
    frozen_a = case.b.requires_grad_(), case.weights
    with saved_bytes(case.a, case.b) as found:
        low_rank_mixture(case.x, case.a, frozen_a[0], frozen_a[1], case.indices)
    assert case.x.data_ptr() not in found  # x serves the gradient of a alone
    case.b.requires_grad_(False)
    with saved_bytes(case.a, case.b, case.weights, case.indices) as found:
        low_rank_mixture(case.x.requires_grad_(), case.a, case.b, case.weights, case.indices)
    assert not found  # for the gradient of x alone nothing of this mixture is kept


def test_the_checker_sees_a_row_sized_copy():
    saved, x_bytes = mixture_bytes(lambda x, *rest: low_rank_mixture(x * x, *rest), torch.float32)
    assert saved > x_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_products_in_fp32_where_16_bit_ones_are_emulated(monkeypatch, request, dtype, native):
    """Both ways agree to the dtype's rounding, with and without a base, at one row and at many."""
    monkeypatch.setattr("moa.kernels.dispatch.has_native_matmul", lambda dtype: native)
    dispatch.choose.cache_clear()
    request.addfinalizer(dispatch.choose.cache_clear)
    for n_rows in (1, 3, 16):
        case = make_case((n_rows,), d_in=32, d_out=16).to(dtype, torch.float32)
        weight, bias = torch.randn(16, 32).to(dtype), torch.randn(16).to(dtype)
        operands = (case.a, case.b, case.weights, case.indices)
        exact = low_rank_mixture(case.x.double(), *operands) + F.linear(*(v.double() for v in (case.x, weight, bias)))
        y = mixture_linear(case.x, weight, bias, *operands)
        assert y.dtype == dtype
        assert (y - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
