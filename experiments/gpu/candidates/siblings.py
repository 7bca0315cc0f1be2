"""Linears that share their rows and their routing, as q, k and v do: one pass over x, gates read once."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moa.kernels.triton.launches import precision, routing_strides
from moa.kernels.triton.thin import Sizes, tile_of

from .bulk import tiles_of
from .ends import keep_shrink


@triton.jit
def _tile_of_factor(a_ptr, columns, column_ok, inner, n, d, EVEN: tl.constexpr):
    """Return a factor's tile (BLOCK_D, BLOCK_C)."""
    ok = column_ok[None, :] if EVEN else column_ok[None, :] & (n + inner < d)[:, None]
    return tl.load(a_ptr + columns[None, :].to(tl.int64) * d + (n + inner)[:, None], mask=ok, other=0.0)


@triton.jit
def _keep_siblings(
    total, total1, total2, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, rows, row_ok, first_column,
    stride_wt, stride_wk, stride_it, stride_ik,
    SIBLINGS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keep hidden and mixed of each."""
    to_hidden = n_rows.to(tl.int64) * (K * RANK)
    to_mixed = n_rows.to(tl.int64) * COLUMNS
    keep_shrink(
        total, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    keep_shrink(
        total1, weights_ptr, indices_ptr, hidden_ptr + to_hidden, mixed_ptr + to_mixed, rows, row_ok, first_column,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    if SIBLINGS == 3:
        keep_shrink(
            total2, weights_ptr, indices_ptr, hidden_ptr + 2 * to_hidden, mixed_ptr + 2 * to_mixed, rows, row_ok,
            first_column, stride_wt, stride_wk, stride_it, stride_ik,
            COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def sibling_shrink_kernel(
    x_ptr, a_ptr, a1_ptr, a2_ptr, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, d, stride_x,
    stride_wt, stride_wk, stride_it, stride_ik,
    SIBLINGS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `shrink_kernel` for two or three factors of one size: hidden (S, T, K, r), mixed (S, T, E·r)."""
    block, rows, columns, row_ok, column_ok = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    inner = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    total1 = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for n in range(0, d, BLOCK_D):
        ok = row_ok[:, None] if EVEN else row_ok[:, None] & (n + inner < d)[None, :]
        value = tl.load(x_ptr + rows[:, None] * stride_x + (n + inner)[None, :], mask=ok, other=0.0)
        factor = _tile_of_factor(a_ptr, columns, column_ok, inner, n, d, EVEN)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
        factor = _tile_of_factor(a1_ptr, columns, column_ok, inner, n, d, EVEN)
        total1 = tl.dot(value, factor, total1, input_precision=PRECISION)
        if SIBLINGS == 3:
            factor = _tile_of_factor(a2_ptr, columns, column_ok, inner, n, d, EVEN)
            total2 = tl.dot(value, factor, total2, input_precision=PRECISION)
    _keep_siblings(
        total, total1, total2, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, rows, row_ok, block * BLOCK_C,
        stride_wt, stride_wk, stride_it, stride_ik, SIBLINGS, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def bulk_sibling_shrink_kernel(
    values, factor, factor1, factor2, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, d,
    stride_wt, stride_wk, stride_it, stride_ik,
    SIBLINGS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same, of descriptors of x (T, i) and of each factor (E·r, i)."""
    block, rows, _, row_ok, _ = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    first = tl.program_id(0) // ((COLUMNS + BLOCK_C - 1) // BLOCK_C) * BLOCK_T
    first_column = block * BLOCK_C
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    total1 = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    total2 = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for n in range(0, d, BLOCK_D):
        value = values.load([first, n])
        total = tl.dot(value, factor.load([first_column, n]).T, total, input_precision=PRECISION)
        total1 = tl.dot(value, factor1.load([first_column, n]).T, total1, input_precision=PRECISION)
        if SIBLINGS == 3:
            total2 = tl.dot(value, factor2.load([first_column, n]).T, total2, input_precision=PRECISION)
    _keep_siblings(
        total, total1, total2, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, rows, row_ok, first_column,
        stride_wt, stride_wk, stride_it, stride_ik, SIBLINGS, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip


def sibling_shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor,
    mixed: Tensor,
    size: Sizes,
    by_engine: bool = False,
) -> None:
    """Write hidden (S, T, K, r) and mixed (S, T, E·r) of two or three linears in one launch.

    Args:
        x: (T, i).
        factors: of each linear (E, r, i), contiguous.
        weights: (T, K), of all of them.
        indices: (T, K) or None, of all of them.
        hidden: written.
        mixed: written.
        size: the tiles.
        by_engine: the copy engine brings the tiles.

    Raises:
        BackendError: it cannot bring them: see `bulk.py`.
        ValueError: there are other than two or three factors, or they differ in size.
    """
    if len(factors) not in (2, 3) or len({a.shape for a in factors}) > 1:
        raise ValueError(
            f"siblings: factors are {[tuple(a.shape) for a in factors]}, expected two or three of one size."
        )
    (n_rows, d), columns = x.shape, mixed.shape[-1]
    if not n_rows:
        return
    grid = (triton.cdiv(n_rows, size.block_t) * triton.cdiv(columns, size.block_c),)
    shared = {
        "SIBLINGS": len(factors), "COLUMNS": columns, "RANK": factors[0].shape[1], "K": weights.shape[1],
        "DENSE": indices is None, "PRECISION": precision(),
        "BLOCK_T": size.block_t, "BLOCK_C": size.block_c, "BLOCK_D": size.block_d,
    }  # fmt: skip
    strides = routing_strides(weights, indices)
    if by_engine:
        tiles = [tiles_of(a.flatten(0, 1), size.block_c, size.block_d) for a in factors]
        bulk_sibling_shrink_kernel[grid](
            tiles_of(x, size.block_t, size.block_d), *(*tiles, None)[:3], weights, indices, hidden, mixed,
            n_rows, d, *strides, **shared, **size.options,
        )  # fmt: skip
    else:
        sibling_shrink_kernel[grid](
            x, *(*factors, None)[:3], weights, indices, hidden, mixed, n_rows, d, x.stride(0), *strides,
            EVEN=d % size.block_d == 0, **shared, **size.options,
        )  # fmt: skip
