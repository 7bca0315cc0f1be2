"""The grouped linear: definition, gradients, op, bad inputs. Run: pytest tests/kernels/test_grouped_linear.py"""

from __future__ import annotations

import pytest
import torch

from moa.errors import BackendError, ShapeError
from moa.kernels import grouped_linear, low_rank_mixture
from moa.kernels.grouped_linear import grouped_linear_backward_op, grouped_linear_op

from .compare import assert_same, assert_three_way, make_case


def operands(n_rows: int = 7, k: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(n_rows + k)
    x = torch.randn(n_rows, 5, dtype=torch.float64, generator=rng)
    weight = torch.randn(4, 6, 5, dtype=torch.float64, generator=rng)
    indices = torch.randint(0, 4, (n_rows, k), generator=rng)
    return x.to(dtype), weight.to(dtype), indices


def definition(x, weight, indices):
    return torch.einsum("ti,tkpi->tkp", x, weight[indices])


def results(function, x, weight, indices):
    leaves = [value.detach().clone().requires_grad_() for value in (x, weight)]
    y = function(*leaves, indices)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def assert_same_results(got, expected):
    """Compare y and two gradients by the helper for five."""
    assert_same((*got, *got[:2]), (*expected, *expected[:2]))


@pytest.mark.parametrize(("n_rows", "k"), [(1, 1), (7, 2), (64, 3)])
def test_values_and_gradients_equal_the_definition(n_rows, k):
    assert_same_results(results(grouped_linear, *operands(n_rows, k)), results(definition, *operands(n_rows, k)))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_way_precision(dtype):
    x, weight, indices = (value.to(dtype) if value.is_floating_point() else value for value in operands(64, 2))
    got, plain = (results(f, x, weight, indices) for f in (grouped_linear, definition))
    exact = results(definition, x.double(), weight.double(), indices)
    assert [value.dtype for value in got] == [dtype] * 3
    eps = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert_three_way(*((*r, *r[:2]) for r in (got, plain, exact)), eps=eps)


def test_gradcheck():
    x, weight, indices = operands()
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, indices), leaves)


@pytest.mark.parametrize("needs", [[True, True], [True, False], [False, True]])
def test_opcheck(needs):
    x, weight, indices = operands(6, 2, torch.float32)
    leaves = [value.requires_grad_(need) for value, need in zip((x, weight), needs, strict=True)]
    torch.library.opcheck(grouped_linear_op, (*leaves, indices, ""))
    grad = torch.randn(6, 2, 6)
    torch.library.opcheck(grouped_linear_backward_op, (grad, x.detach(), weight.detach(), indices, "", needs))


def test_it_compiles_in_one_graph():
    x, weight, indices = operands(6, 2, torch.float32)
    compiled = torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")
    pairs = zip(results(compiled, x, weight, indices), results(grouped_linear, x, weight, indices), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=0, rtol=0)


def test_zero_rows_and_experts_without_rows():
    x, weight, indices = operands()
    y, grad_x, grad_weight = results(grouped_linear, x[:0], weight, indices[:0])
    assert y.shape == (0, 2, 6) and grad_x.shape == (0, 5) and (grad_weight == 0).all()
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


def test_bad_engines_are_named():
    with pytest.raises(BackendError, match="Did you mean 'sorted'"):
        grouped_linear(*operands(), engine="sort")
    with pytest.raises(BackendError, match=r"needs a CUDA device|not installed"):
        grouped_linear(*operands(), engine="triton_grouped")
