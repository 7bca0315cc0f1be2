"""The way up as a weighted bag of rows. Run: pytest tests/kernels/test_bag.py"""

from __future__ import annotations

import pytest
import torch

from moa.kernels import bag
from moa.kernels.concat import slot_columns


def operands(n_rows: int = 40, k: int = 2, n_experts: int = 8, rank: int = 4) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(n_rows)
    indices = torch.randint(0, n_experts, (n_rows, k), generator=rng)  # rows may choose one twice
    return torch.randn(n_rows, k, rank, generator=rng), indices, torch.randn(n_experts, rank, 24, generator=rng)


def expand(values: torch.Tensor, indices: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return bag.expand(values.flatten(1), slot_columns(indices, factors), factors.flatten(0, 1))


@pytest.mark.parametrize("n_rows", [0, 1, 40])
def test_it_equals_the_sum_in_fp64(n_rows):
    values, indices, factors = operands(n_rows)
    exact = torch.einsum("tkr,tkrd->td", values.double(), factors[indices].double())
    got = expand(values, indices, factors).double()
    assert got.shape == (n_rows, 24)
    torch.testing.assert_close(got, exact, atol=2e-5, rtol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got + 1e-3, exact if n_rows else exact.new_ones(1, 24), atol=2e-5, rtol=1e-5)


def test_an_expert_that_no_row_chose_is_not_read():
    values, indices, factors = operands()
    factors[7] = torch.nan
    assert expand(values, indices.clamp(max=6), factors).isfinite().all()


@pytest.mark.parametrize(
    ("k", "rank", "n_experts", "dtype", "expected"),
    [
        (2, 8, 8, torch.float32, True),
        (2, 16, 8, torch.float32, True),
        (2, 32, 8, torch.float32, False),  # 64 rows in a bag
        (3, 8, 8, torch.float32, False),  # not sparse enough
        (2, 8, 8, torch.float64, False),
        (2, 8, 8, torch.bfloat16, False),
    ],
)
def test_where_it_is_taken(k, rank, n_experts, dtype, expected):
    assert bag.pays(torch.empty(5, k * rank, dtype=dtype), n_experts * rank) is expected
