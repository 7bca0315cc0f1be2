"""Triton kernels of thin products: shrink, expand, their gradients. No atomics, fp32 accumulators, int64 row offsets.

Columns are the E·r concatenated ranks: column c belongs to expert c // r. A gate is the sum of a row's weights for
the expert of a column; 0 means not chosen, and `where` instead of a product keeps 0 · inf out of the results.
Row counts are not specialised: a batch of another length compiles nothing, and a single row is not a special case.
Launches and sizes: `launches.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from .launcher import launched

# Said outright, because triton's default changes between releases, and 3.9 warns where nobody says.
FUSED = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Sizes:
    """Tile sizes of one launch: rows, columns (E·r), features; warps and pipeline stages."""

    block_t: int
    block_c: int
    block_d: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, Any]:
        """The compiler options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages, **FUSED}


@triton.jit
def tile_of(n_rows, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return this program's block of columns, its rows and columns, and which of them there are.

    Column blocks of one row block are neighbours, so that all but one of them find its rows in cache.
    """
    blocks: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) % blocks
    rows = (tl.program_id(0) // blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return block, rows, columns, rows < n_rows, columns < COLUMNS


@triton.jit
def project(
    values_ptr,
    factor_ptr,
    rows,
    row_ok,
    columns,
    column_ok,
    start,
    stop,
    d,
    stride_row,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum values[row, n] · factor[column, n] over n = start … stop - 1: (BLOCK_T, BLOCK_C) fp32."""
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    inner = tl.arange(0, BLOCK_D)
    value_ptrs = values_ptr + rows[:, None] * stride_row + inner[None, :]
    factor_ptrs = factor_ptr + columns[None, :].to(tl.int64) * d + inner[:, None]
    for n in range(start, stop, BLOCK_D):
        if EVEN:
            value = tl.load(value_ptrs + n, mask=row_ok[:, None], other=0.0)
            factor = tl.load(factor_ptrs + n, mask=column_ok[None, :], other=0.0)
        else:
            ok = n + inner < stop
            value = tl.load(value_ptrs + n, mask=row_ok[:, None] & ok[None, :], other=0.0)
            factor = tl.load(factor_ptrs + n, mask=column_ok[None, :] & ok[:, None], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
    return total


@triton.jit
def column_gate(
    weights_ptr,
    indices_ptr,
    rows,
    row_ok,
    experts,
    column_ok,
    stride_wt,
    stride_wk,
    stride_it,
    stride_ik,
    K: tl.constexpr,
    DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Return the weight of each column's expert on each row: (BLOCK_T, BLOCK_C) fp32."""
    if DENSE:
        places = weights_ptr + rows[:, None] * stride_wt + experts[None, :] * stride_wk
        gate = tl.load(places, mask=row_ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
    else:
        gate = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for j in range(K):
            expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
            weight = tl.load(weights_ptr + rows * stride_wt + j * stride_wk, mask=row_ok, other=0.0)
            chosen = expert[:, None] == experts[None, :]
            gate += tl.where(chosen, weight.to(tl.float32)[:, None], 0.0)
    return gate


@triton.jit
def store_hidden(
    hidden_ptr,
    indices_ptr,
    total,
    rows,
    row_ok,
    columns,
    column_ok,
    stride_it,
    stride_ik,
    RANK: tl.constexpr,
    K: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Keep the chosen part of the hidden values: (T, K, r)."""
    value = total.to(hidden_ptr.dtype.element_ty)
    if DENSE:
        places = (hidden_ptr + rows * (K * RANK))[:, None] + columns[None, :]
        tl.store(places, value, mask=row_ok[:, None] & column_ok[None, :])
    else:
        experts = columns // RANK
        within = columns % RANK
        for j in range(K):
            expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
            chosen = (expert[:, None] == experts[None, :]) & column_ok[None, :]
            places = (hidden_ptr + rows * (K * RANK))[:, None] + (j * RANK + within)[None, :]
            tl.store(places, value, mask=chosen & row_ok[:, None])


@launched(do_not_specialize=["n_rows"])
def shrink_kernel(
    x_ptr,
    a_ptr,
    weights_ptr,
    indices_ptr,
    hidden_ptr,
    mixed_ptr,
    n_rows,
    d,
    stride_x,
    stride_wt,
    stride_wk,
    stride_it,
    stride_ik,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    DENSE: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden = (x aᵀ) of the chosen experts (T, K, r); mixed = hidden · gate over all columns (T, E·r)."""
    _, rows, columns, row_ok, column_ok = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    total = project(
        x_ptr, a_ptr, rows, row_ok, columns, column_ok, 0, d, d, stride_x, EVEN, PRECISION, BLOCK_T, BLOCK_C, BLOCK_D
    )
    store_hidden(hidden_ptr, indices_ptr, total, rows, row_ok, columns, column_ok, stride_it, stride_ik, RANK, K, DENSE)
    experts = columns // RANK
    gate = column_gate(
        weights_ptr, indices_ptr, rows, row_ok, experts, column_ok, stride_wt, stride_wk, stride_it, stride_ik,
        K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    mixed = tl.where(gate != 0.0, total * gate, 0.0).to(mixed_ptr.dtype.element_ty)
    places = (mixed_ptr + rows * COLUMNS)[:, None] + columns[None, :]
    tl.store(places, mixed, mask=row_ok[:, None] & column_ok[None, :])


@launched(do_not_specialize=["n_rows"])
def expand_kernel(
    mixed_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    n_rows,
    d,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[t, n] = Σ_c mixed[t, c] factor[c, n] (+ bias[n]), the columns in chunks of BLOCK_C."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok = rows < n_rows
    inner_ok = inner < d
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for first in range(0, COLUMNS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_ok = columns < COLUMNS
        mixed_ptrs = mixed_ptr + rows[:, None] * COLUMNS + columns[None, :]
        factor_ptrs = factor_ptr + columns[:, None].to(tl.int64) * d + inner[None, :]
        mixed = tl.load(mixed_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        factor = tl.load(factor_ptrs, mask=column_ok[:, None] & inner_ok[None, :], other=0.0)
        total = tl.dot(mixed, factor, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + inner, mask=inner_ok, other=0.0).to(tl.float32)[None, :]
    places = out_ptr + rows[:, None] * d + inner[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & inner_ok[None, :])


@launched(do_not_specialize=["n_rows"])
def unmix_kernel(
    grad_ptr,
    b_ptr,
    weights_ptr,
    indices_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    mixed_ptr,
    grad_weights_ptr,
    n_rows,
    d,
    stride_grad,
    stride_wt,
    stride_wk,
    stride_it,
    stride_ik,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    DENSE: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_MIXED: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The shrink's way back: one product dy bᵀ, then what is asked for of

    grad_hidden = (dy bᵀ) · gate (T, E·r), mixed = hidden · gate (T, E·r), and the partial sums of each column block
    of grad_weights = Σ_r (dy bᵀ) · hidden (blocks, T, K).
    """
    block, rows, columns, row_ok, column_ok = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    both_ok = row_ok[:, None] & column_ok[None, :]
    experts = columns // RANK
    within = columns % RANK
    gate = column_gate(
        weights_ptr, indices_ptr, rows, row_ok, experts, column_ok, stride_wt, stride_wk, stride_it, stride_ik,
        K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip
    hidden = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    if NEED_MIXED or NEED_WEIGHTS:
        if DENSE:
            hidden = tl.load((hidden_ptr + rows * COLUMNS)[:, None] + columns[None, :], mask=both_ok, other=0.0).to(
                tl.float32
            )
        else:
            for j in range(K):
                expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
                chosen = (expert[:, None] == experts[None, :]) & both_ok
                slot_ptrs = (hidden_ptr + rows * (K * RANK))[:, None] + (j * RANK + within)[None, :]
                hidden = tl.where(chosen, tl.load(slot_ptrs, mask=chosen, other=0.0).to(tl.float32), hidden)
    if NEED_MIXED:
        mixed = tl.where(gate != 0.0, hidden * gate, 0.0).to(mixed_ptr.dtype.element_ty)
        tl.store((mixed_ptr + rows * COLUMNS)[:, None] + columns[None, :], mixed, mask=both_ok)
    if NEED_HIDDEN or NEED_WEIGHTS:
        total = project(
            grad_ptr, b_ptr, rows, row_ok, columns, column_ok, 0, d, d, stride_grad, EVEN, PRECISION,
            BLOCK_T, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        if NEED_HIDDEN:
            back = tl.where(gate != 0.0, total * gate, 0.0).to(grad_hidden_ptr.dtype.element_ty)
            tl.store((grad_hidden_ptr + rows * COLUMNS)[:, None] + columns[None, :], back, mask=both_ok)
        if NEED_WEIGHTS:
            part_rows = block.to(tl.int64) * n_rows + rows
            for j in range(K):
                if DENSE:
                    chosen = (experts[None, :] == j) & both_ok
                else:
                    expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
                    chosen = (expert[:, None] == experts[None, :]) & both_ok
                part = tl.sum(tl.where(chosen, total * hidden, 0.0), axis=1)
                tl.store(grad_weights_ptr + part_rows * K + j, part, mask=row_ok)


@launched(do_not_specialize=["n_rows", "rows_per_split"])
def gram_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    n_rows,
    d,
    stride_right,
    rows_per_split,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[s, c, n] = Σ_t left[t, c] right[t, n] over the rows of split s; a second pass adds the splits."""
    inner = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inner_ok = inner < d
    column_ok = columns < COLUMNS
    start = tl.program_id(2) * rows_per_split
    stop = tl.minimum(start + rows_per_split, n_rows)
    total = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for first in range(start, stop, BLOCK_T):
        rows = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        row_ok = rows < stop
        left_ptrs = left_ptr + rows[:, None] * COLUMNS + columns[None, :]
        right_ptrs = right_ptr + rows[:, None] * stride_right + inner[None, :]
        left = tl.load(left_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    split = tl.program_id(2).to(tl.int64) * COLUMNS
    places = out_ptr + (split + columns[:, None]) * d + inner[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=column_ok[:, None] & inner_ok[None, :])


@launched(do_not_specialize=["n_splits"])
def add_splits_kernel(parts_ptr, out_ptr, size, n_splits, BLOCK: tl.constexpr):
    """out[n] = Σ_s parts[s, n], in the order of s: the deterministic second reduction."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = places < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part_ptrs = parts_ptr + places
    for _ in range(n_splits):
        total += tl.load(part_ptrs, mask=ok, other=0.0)
        part_ptrs += size
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=ok)
