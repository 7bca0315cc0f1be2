"""Few rows, as in decoding: two launches with static grids. The shrink splits the features to fill the device, the
expand adds the splits in its prologue, applies the gate and keeps the hidden values.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .launcher import launched
from .thin import Sizes, column_gate, project, store_hidden
from .tiles import cdiv, next_power_of_2

# Up to this many rows one row block is enough, and splitting features is what fills the device.
MAX_ROWS = 64
_FEATURES_PER_SPLIT = 256


@launched(do_not_specialize=["n_rows"])
def partial_shrink_kernel(
    x_ptr,
    a_ptr,
    parts_ptr,
    n_rows,
    d,
    stride_x,
    d_per_split,
    COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """parts[s] = x aᵀ over the features of split s: (splits, T, E·r) fp32."""
    rows = tl.arange(0, BLOCK_T).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ok = rows < n_rows
    column_ok = columns < COLUMNS
    start = tl.program_id(1) * d_per_split
    stop = tl.minimum(start + d_per_split, d)
    total = project(
        x_ptr, a_ptr, rows, row_ok, columns, column_ok, start, stop, d, stride_x, EVEN, PRECISION,
        BLOCK_T, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    part_rows = tl.program_id(1) * n_rows + rows
    places = (parts_ptr + part_rows * COLUMNS)[:, None] + columns[None, :]
    tl.store(places, total, mask=row_ok[:, None] & column_ok[None, :])


@launched(do_not_specialize=["n_rows", "n_splits"])
def gated_expand_kernel(
    parts_ptr,
    factor_ptr,
    bias_ptr,
    weights_ptr,
    indices_ptr,
    hidden_ptr,
    out_ptr,
    n_rows,
    d,
    n_splits,
    stride_wt,
    stride_wk,
    stride_it,
    stride_ik,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    DENSE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """hidden = Σ_s parts[s] of the chosen experts; out = (hidden · gate) factor (+ bias)."""
    rows = tl.arange(0, BLOCK_T).to(tl.int64)
    inner = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok = rows < n_rows
    inner_ok = inner < d
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for first in range(0, COLUMNS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_ok = columns < COLUMNS
        part_ptrs = (parts_ptr + rows * COLUMNS)[:, None] + columns[None, :]
        hidden = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
        for _ in range(n_splits):
            hidden += tl.load(part_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
            part_ptrs += n_rows * COLUMNS
        if tl.program_id(0) == 0:
            store_hidden(
                hidden_ptr, indices_ptr, hidden, rows, row_ok, columns, column_ok, stride_it, stride_ik,
                RANK, K, DENSE,
            )  # fmt: skip
        gate = column_gate(
            weights_ptr, indices_ptr, rows, row_ok, columns // RANK, column_ok, stride_wt, stride_wk, stride_it,
            stride_ik, K, DENSE, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        mixed = tl.where(gate != 0.0, hidden * gate, 0.0).to(factor_ptr.dtype.element_ty)
        factor_ptrs = factor_ptr + columns[:, None].to(tl.int64) * d + inner[None, :]
        factor = tl.load(factor_ptrs, mask=column_ok[:, None] & inner_ok[None, :], other=0.0)
        total = tl.dot(mixed, factor, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + inner, mask=inner_ok, other=0.0).to(tl.float32)[None, :]
    places = (out_ptr + rows * d)[:, None] + inner[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & inner_ok[None, :])


def shrink_sizes(n_rows: int, itemsize: int) -> Sizes:
    """Return the tiles of the split shrink: one row block, and columns narrow enough to give many programs."""
    return Sizes(max(16, next_power_of_2(n_rows)), 16, 128 // itemsize, 4, 3)


def expand_sizes(n_rows: int, columns: int, itemsize: int) -> Sizes:
    """Return the tiles of the gated expand: one row block, narrow in features."""
    block_t = max(16, next_power_of_2(n_rows))
    block_c = min(128 // itemsize, max(16, next_power_of_2(columns)))
    return Sizes(block_t, block_c, 32, 4 if block_t == 16 else 8, 2)


def mix_few_rows(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    bias: Tensor | None,
    strides: tuple[int, ...],
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r) of T ≤ MAX_ROWS rows in two launches; base excluded.

    Args:
        x: (T, i) with adjacent features.
        a: (E, r, i) contiguous.
        b: (E, r, o) contiguous.
        weights: (T, K).
        indices: (T, K) or None.
        bias: (o,) or None.
        strides: of weights and indices.
        precision: of fp32 products, "ieee" or "tf32".
    """
    n_rows, d_in = x.shape
    n_experts, rank, d_out = b.shape
    columns = n_experts * rank
    shrink = shrink_sizes(n_rows, x.itemsize)
    block_d = shrink.block_d
    splits = max(1, d_in // _FEATURES_PER_SPLIT)
    d_per_split = cdiv(cdiv(d_in, splits), block_d) * block_d
    splits = cdiv(d_in, d_per_split)
    parts = x.new_empty(splits, n_rows, columns, dtype=torch.float32)
    partial_shrink_kernel[(cdiv(columns, shrink.block_c), splits)](
        x, a, parts, n_rows, d_in, x.stride(0), d_per_split,
        COLUMNS=columns, EVEN=d_in % block_d == 0, PRECISION=precision,
        BLOCK_T=shrink.block_t, BLOCK_C=shrink.block_c, BLOCK_D=shrink.block_d,
        **shrink.options,
    )  # fmt: skip
    size = expand_sizes(n_rows, columns, x.itemsize)
    hidden = x.new_empty(n_rows, weights.shape[1], rank)
    y = x.new_empty(n_rows, d_out)
    gated_expand_kernel[(cdiv(d_out, size.block_d),)](
        parts, b, bias, weights, indices, hidden, y, n_rows, d_out, splits, *strides,
        COLUMNS=columns, RANK=rank, K=weights.shape[1], DENSE=indices is None, HAS_BIAS=bias is not None,
        PRECISION=precision, BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d,
        **size.options,
    )  # fmt: skip
    return y, hidden
