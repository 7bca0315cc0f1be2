"""The engines over a grouped product: a plain one in fp64, torch's grouped_mm, and megablocks behind a stand-in.

Run: pytest tests/kernels/test_grouped.py
"""

from __future__ import annotations

import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from moa.errors import BackendError
from moa.kernels import Operands, engines, low_rank_mixture, megablocks
from moa.kernels.grouped import grouped_backward, grouped_forward
from moa.kernels.reference import low_rank_mixture_reference

from .compare import EPS, assert_same, assert_three_way, make_case, results, truth


class PlainProduct:
    """The grouped product as a loop over experts."""

    def rows(self, values: Tensor, factors: Tensor, offsets: Tensor) -> Tensor:
        edges = offsets.tolist()
        return torch.cat([values[edges[e] : edges[e + 1]] @ factors[e] for e in range(factors.shape[0])])

    def gram(self, left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
        edges = offsets.tolist()
        spans = [slice(*edges[e : e + 2]) for e in range(len(edges) - 1)]
        return torch.stack([left[span].T @ right[span] for span in spans])


@pytest.mark.parametrize("k", [1, 2, 4, None])
@pytest.mark.parametrize("with_base", [True, False])
def test_the_grouped_form_equals_the_truth(k, with_base, poisoned):
    case = make_case((9,), k=k)
    base, bias = (torch.randn(7, 5).double(), torch.randn(7).double()) if with_base else (None, None)
    operands = Operands(case.x, case.a, case.b, case.weights, case.indices, base, bias)
    y, hidden = grouped_forward(PlainProduct(), operands)
    grads = grouped_backward(PlainProduct(), case.grad, operands, hidden, [True] * 4)
    expected = truth(case)
    if base is not None:
        expected = (expected[0] + case.x @ base.T + bias, expected[1] + case.grad @ base, *expected[2:])
    assert_same((y, *grads), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, None])
def test_grouped_mm_three_way(dtype, k, poisoned):
    case = make_case((64,), d_in=96, d_out=80, n_experts=8, rank=8, k=k).to(dtype, torch.float32)
    got = results(partial(low_rank_mixture, engine="grouped_mm"), case)
    assert_three_way(got, results(low_rank_mixture_reference, case), truth(case), eps=EPS[dtype])


def test_grouped_mm_with_experts_nobody_chose_and_without_rows():
    case = make_case((16,), d_in=8, d_out=8, n_experts=8, rank=8, k=1).to(torch.float32)
    case.indices.fill_(3)
    got = results(partial(low_rank_mixture, engine="grouped_mm"), case)
    assert_three_way(got, results(low_rank_mixture_reference, case), truth(case), eps=1e-6)
    assert (got[2][:3] == 0).all() and (got[3][4:] == 0).all()
    empty = make_case((0,), d_in=8, d_out=8, rank=8).to(torch.float32)
    for value in results(partial(low_rank_mixture, engine="grouped_mm"), empty):
        assert value.numel() == 0 or (value == 0).all()


def test_grouped_mm_refuses_what_it_cannot_multiply():
    for case, message in (
        (make_case((4,), d_in=8, d_out=8, rank=3).to(torch.float32), "multiples of 16 bytes, got 3 elements"),
        (make_case((4,), d_in=8, d_out=8, rank=8), "does not run in torch.float64"),
    ):
        with pytest.raises(BackendError, match=message):
            low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices, engine="grouped_mm")


def test_megablocks_says_why_it_cannot_run():
    case = make_case((4,))
    if engines()["megablocks"]:
        with pytest.raises(BackendError, match="'megablocks' cannot run here: it needs"):
            low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices, engine="megablocks")


def test_the_megablocks_adapter_passes_what_its_grouped_gemm_takes(monkeypatch):
    """Contiguous operands, batch sizes as int64 on the host, a transposed left side for weight gradients."""
    calls = []

    def gmm(left: Tensor, right: Tensor, sizes: Tensor, trans_a: bool = False) -> Tensor:
        assert left.is_contiguous() and right.is_contiguous()
        assert sizes.device.type == "cpu" and sizes.dtype == torch.int64 and sizes.sum() == left.shape[0]
        calls.append(trans_a)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        return (PlainProduct().gram if trans_a else PlainProduct().rows)(left, right, offsets)

    package = ModuleType("megablocks")
    package.grouped_gemm_util = SimpleNamespace(backend=SimpleNamespace(gmm=gmm))
    monkeypatch.setitem(sys.modules, "megablocks", package)
    monkeypatch.setattr(megablocks, "check", lambda values: None)
    case = make_case((9,))
    operands = Operands(case.x, case.a, case.b, case.weights, case.indices)
    y, hidden = megablocks.forward(operands)
    grads = megablocks.backward(case.grad, operands, hidden, [True] * 4)
    assert_same((y, *grads), truth(case))
    assert sorted(calls) == [False] * 4 + [True] * 2


def test_megablocks_refuses_other_dtypes_and_devices():
    with pytest.raises(BackendError, match=r"bf16 on CUDA, got torch\.float32 on cpu"):
        megablocks.check(torch.zeros(1))
