"""What follows a product in every shrink and unmix: the gate, and what is kept. As in the package's kernels."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import triton
import triton.language as tl

from moa.kernels.triton.thin import column_gate, store_hidden


@triton.jit
def _halves(total, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the first and the last columns: addresses and gates of all take more registers than the product itself."""
    return tl.split(tl.permute(tl.reshape(total, (BLOCK_T, 2, BLOCK_C // 2)), (0, 2, 1)))


@triton.jit
def keep_shrink(
    total, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keep hidden (T, K, r) and mixed (T, E·r) of a product (BLOCK_T, BLOCK_C)."""
    one, other = _halves(total, BLOCK_T, BLOCK_C)
    _keep_shrink(
        one, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C // 2,
    )  # fmt: skip
    _keep_shrink(
        other, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column + BLOCK_C // 2,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C // 2,
    )  # fmt: skip


@triton.jit
def _keep_shrink(
    total, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = first_column + tl.arange(0, BLOCK_C)
    column_ok = columns < COLUMNS
    store_hidden(hidden_ptr, indices_ptr, total, rows, row_ok, columns, column_ok, stride_it, stride_ik, RANK, K, DENSE)
    gate = column_gate(
        weights_ptr, indices_ptr, rows, row_ok, columns // RANK, column_ok, stride_wt, stride_wk, stride_it, stride_ik,
        K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    mixed = tl.where(gate != 0.0, total * gate, 0.0).to(mixed_ptr.dtype.element_ty)
    places = (mixed_ptr + rows * COLUMNS)[:, None] + columns[None, :]
    tl.store(places, mixed, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def hidden_of(
    hidden_ptr, indices_ptr, rows, row_ok, columns, column_ok, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the kept hidden values in the place of their columns, 0 elsewhere: (BLOCK_T, BLOCK_C) fp32."""
    both_ok = row_ok[:, None] & column_ok[None, :]
    if DENSE:
        hidden = tl.load((hidden_ptr + rows * COLUMNS)[:, None] + columns[None, :], mask=both_ok, other=0.0)
        hidden = hidden.to(tl.float32)
    else:
        hidden = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for j in range(K):
            expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
            chosen = (expert[:, None] == (columns // RANK)[None, :]) & both_ok
            places = (hidden_ptr + rows * (K * RANK))[:, None] + (j * RANK + columns % RANK)[None, :]
            hidden = tl.where(chosen, tl.load(places, mask=chosen, other=0.0).to(tl.float32), hidden)
    return hidden


@triton.jit
def keep_unmix(
    total, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, mixed_ptr, grad_weights_ptr,
    block, n_rows, rows, row_ok, stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr, NEED_MIXED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keep grad_hidden (T, E·r), mixed (T, E·r) where asked, and this block's sums of grad_weights (blocks, T, K)."""
    half: tl.constexpr = BLOCK_C // 2
    first = block * BLOCK_C
    one, other = _halves(total, BLOCK_T, BLOCK_C)
    one = _keep_unmix(
        one, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, mixed_ptr, rows, row_ok, first,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, NEED_MIXED, BLOCK_T, half,
    )  # fmt: skip
    other = _keep_unmix(
        other, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, mixed_ptr, rows, row_ok, first + half,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, NEED_MIXED, BLOCK_T, half,
    )  # fmt: skip
    part_rows = block.to(tl.int64) * n_rows + rows
    for j in range(K):
        part = _of_slot(one, indices_ptr, rows, row_ok, first, j, stride_it, stride_ik, COLUMNS, RANK, DENSE, half)
        part += _of_slot(
            other, indices_ptr, rows, row_ok, first + half, j, stride_it, stride_ik, COLUMNS, RANK, DENSE, half
        )
        tl.store(grad_weights_ptr + part_rows * K + j, part, mask=row_ok)


@triton.jit
def _keep_unmix(
    total, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, mixed_ptr, rows, row_ok, first_column,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr, NEED_MIXED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Keep what a block of columns gives, and return total · hidden."""
    columns = first_column + tl.arange(0, BLOCK_C)
    column_ok = columns < COLUMNS
    both_ok = row_ok[:, None] & column_ok[None, :]
    places = rows[:, None] * COLUMNS + columns[None, :]
    gate = column_gate(
        weights_ptr, indices_ptr, rows, row_ok, columns // RANK, column_ok, stride_wt, stride_wk, stride_it, stride_ik,
        K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    back = tl.where(gate != 0.0, total * gate, 0.0)
    tl.store(grad_hidden_ptr + places, back.to(grad_hidden_ptr.dtype.element_ty), mask=both_ok)
    hidden = hidden_of(
        hidden_ptr, indices_ptr, rows, row_ok, columns, column_ok, stride_it, stride_ik, COLUMNS, RANK, K, DENSE,
        BLOCK_T, BLOCK_C,
    )  # fmt: skip
    if NEED_MIXED:
        mixed = tl.where(gate != 0.0, hidden * gate, 0.0)
        tl.store(mixed_ptr + places, mixed.to(mixed_ptr.dtype.element_ty), mask=both_ok)
    return total * hidden


@triton.jit
def _of_slot(
    both, indices_ptr, rows, row_ok, first_column, j, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, DENSE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return the sum over the columns of the expert in slot j of each row: (BLOCK_T,)."""
    columns = first_column + tl.arange(0, BLOCK_C)
    experts = columns // RANK
    both_ok = row_ok[:, None] & (columns < COLUMNS)[None, :]
    if DENSE:
        chosen = (experts[None, :] == j) & both_ok
    else:
        expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
        chosen = (expert[:, None] == experts[None, :]) & both_ok
    return tl.sum(tl.where(chosen, both, 0.0), axis=1)
