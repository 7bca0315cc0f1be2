"""The grouped linear and its adjoint: definition, gradients, op, bad inputs.

Run: pytest tests/kernels/test_grouped_linear.py
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from moa.errors import BackendError, ShapeError
from moa.kernels import grouped_linear, grouped_sum, low_rank_mixture
from moa.kernels.grouped_linear import grouped_linear_backward_op, grouped_linear_op, grouped_sum_op

from .compare import assert_same, assert_three_way, make_case


def operands(n_rows: int = 7, k: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(n_rows + k)
    x = torch.randn(n_rows, 5, dtype=torch.float64, generator=rng)
    weight = torch.randn(4, 6, 5, dtype=torch.float64, generator=rng)
    indices = torch.randint(0, 4, (n_rows, k), generator=rng)
    return x.to(dtype), weight.to(dtype), indices


def definition(x, weight, indices):
    return torch.einsum("ti,tkpi->tkp", x, weight[indices])


def definition_of_sum(values, weight, indices):
    return torch.einsum("tkp,tkpi->ti", values, weight[indices])


def sum_operands(n_rows: int = 7, k: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Twelve experts, so that a bag pays at k = 2; rows may choose one twice."""
    rng = torch.Generator().manual_seed(n_rows + k)
    values = torch.randn(n_rows, k, 6, dtype=torch.float64, generator=rng)
    weight = torch.randn(12, 6, 5, dtype=torch.float64, generator=rng)
    return values.to(dtype), weight.to(dtype), torch.randint(0, 12, (n_rows, k), generator=rng)


OPS = {
    "linear": (grouped_linear, definition, operands),
    "sum": (grouped_sum, definition_of_sum, sum_operands),
}
each_op = pytest.mark.parametrize(("op", "truth", "make"), OPS.values(), ids=OPS.keys())
each_engine = pytest.mark.parametrize("engine", [None, "concat", "sorted"])


def results(function, x, weight, indices):
    leaves = [value.detach().clone().requires_grad_() for value in (x, weight)]
    y = function(*leaves, indices)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_same_results(got, expected):
    """Compare y and two gradients by the helper for five."""
    assert_same((*got, *got[:2]), (*expected, *expected[:2]))


@each_op
@each_engine
@pytest.mark.parametrize(("n_rows", "k"), [(1, 1), (7, 2), (64, 3)])
def test_values_and_gradients_equal_the_definition(op, truth, make, engine, n_rows, k):
    case = make(n_rows, k)
    assert_same_results(results(partial(op, engine=engine), *case), results(truth, *case))


def test_the_comparison_fails_on_a_wrong_value():
    right = results(definition, *operands())
    with pytest.raises(AssertionError):
        assert_same_results((right[0], right[1] * 1.001, right[2]), right)


def test_two_of_them_and_a_weighted_sum_are_the_mixture():
    case = make_case((9,), k=3)
    hidden = grouped_linear(case.x, case.a, case.indices)
    slots = grouped_linear(hidden.flatten(0, 1), case.b.mT, case.indices.reshape(-1, 1)).view(9, 3, -1)
    expected = low_rank_mixture(case.x, case.a, case.b, case.weights, case.indices)
    torch.testing.assert_close((slots * case.weights[..., None]).sum(1), expected, atol=1e-12, rtol=1e-12)


@each_op
@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_way_precision(op, truth, make, engine, dtype):
    case = make(64, 2, dtype)
    got, plain = results(partial(op, engine=engine), *case), results(truth, *case)
    exact = results(truth, *(value.double() if value.is_floating_point() else value for value in case))
    assert [value.dtype for value in got] == [dtype] * 3
    eps = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert_three_way(*((*r, *r[:2]) for r in (got, plain, exact)), eps=eps)


@each_op
def test_gradcheck(op, truth, make):
    x, weight, indices = make()
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: op(a, b, indices), leaves)


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]])
def test_opcheck(needs):
    x, weight, indices = operands(6, 2, torch.float32)
    leaves = [value.requires_grad_(need) for value, need in zip((x, weight), needs, strict=True)]
    torch.library.opcheck(grouped_linear_op, (*leaves, indices, ""))
    grad = torch.randn(6, 2, 6)
    torch.library.opcheck(grouped_linear_backward_op, (grad, x.detach(), weight.detach(), indices, "", needs))
    values, weight, indices = sum_operands(6, 2, torch.float32)
    leaves = [value.requires_grad_(need) for value, need in zip((values, weight), needs, strict=True)]
    torch.library.opcheck(grouped_sum_op, (*leaves, indices, ""))


@each_op
def test_it_compiles_in_one_graph(op, truth, make):
    x, weight, indices = make(6, 2, torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    pairs = zip(results(compiled, x, weight, indices), results(op, x, weight, indices), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_zero_rows_and_experts_without_rows():
    x, weight, indices = operands()
    y, grad_x, grad_weight = results(grouped_linear, x[:0], weight, indices[:0])
    assert y.shape == (0, 2, 6) and grad_x.shape == (0, 5) and (grad_weight == 0).all()
    values, weight, indices = sum_operands()
    total, grad_values, grad_weight = results(grouped_sum, values[:0], weight, indices[:0])
    assert total.shape == (0, 5) and grad_values.shape == (0, 2, 6) and (grad_weight == 0).all()
    x, weight, indices = operands()
    grads = results(grouped_linear, x, weight, torch.full_like(indices, 2))[2]
    assert (grads[[0, 1, 3]] == 0).all() and (grads[2] != 0).any()


def test_leading_axes_strided_rows_and_masters():
    x, weight, indices = operands(6, 2, torch.float32)
    y = grouped_linear(x.T.contiguous().T.view(2, 3, 5), weight, indices.view(2, 3, 2))
    torch.testing.assert_close(y.view(6, 2, 6), definition(x, weight, indices))
    leaf = weight.clone().requires_grad_()
    out = grouped_linear(x.bfloat16(), leaf, indices)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and leaf.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x, weight, indices).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda x, w, i: (x[:, :4], w, i), ShapeError, "do not fit"),
        (lambda x, w, i: (x, w[0], i), ShapeError, "do not fit"),
        (lambda x, w, i: (x, w, i[:3]), ShapeError, "same rows"),
        (lambda x, w, i: (x, w, i.int()), ShapeError, "int64"),
        (lambda x, w, i: (x.long(), w, i), ShapeError, "floating"),
        (lambda x, w, i: (x, w.to("meta"), i), ShapeError, "move one"),
        (lambda x, w, i: (x, w, i + 4), ShapeError, "experts 0 … 3"),
    ],
)
def test_bad_operands_are_named(change, error, words):
    with pytest.raises(error, match=words):
        grouped_linear(*change(*operands()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v, w, i: (v[:, :1], w, i), "do not fit"),
        (lambda v, w, i: (v[..., :4], w, i), "do not fit"),
        (lambda v, w, i: (v, w[0], i), "do not fit"),
        (lambda v, w, i: (v, w, i.int()), "int64"),
        (lambda v, w, i: (v, w, i + 12), "experts 0 … 11"),
    ],
)
def test_bad_operands_of_the_sum_are_named(change, words):
    with pytest.raises(ShapeError, match=words):
        grouped_sum(*change(*sum_operands()))


def test_bad_engines_are_named():
    with pytest.raises(BackendError, match="Did you mean 'sorted'"):
        grouped_linear(*operands(), engine="sort")
    with pytest.raises(BackendError, match=r"needs a CUDA device|not installed"):
        grouped_linear(*operands(), engine="triton_grouped")
