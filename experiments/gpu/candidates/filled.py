"""Shrinks that fill the device: features split over programs, and a second pass in a fixed order; a persistent grid."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa.kernels.triton.launches import precision, routing_strides
from moa.kernels.triton.thin import Sizes, project

from .bulk import bulk_project, tiles_of
from .ends import keep_shrink


@triton.jit(do_not_specialize=["n_rows"])
def split_shrink_kernel(
    x_ptr, a_ptr, parts_ptr, n_rows, d, stride_x, d_per_split,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """parts[s] = x aᵀ over the features of split s: (splits, T, E·r) fp32."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row_ok, column_ok = rows < n_rows, columns < COLUMNS
    start = tl.program_id(2) * d_per_split
    total = project(
        x_ptr, a_ptr, rows, row_ok, columns, column_ok, start, tl.minimum(start + d_per_split, d), d, stride_x,
        EVEN, PRECISION, BLOCK_T, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    part_rows = tl.program_id(2).to(tl.int64) * n_rows + rows
    places = parts_ptr + part_rows[:, None] * COLUMNS + columns[None, :]
    tl.store(places, total, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def bulk_split_shrink_kernel(
    values, factor, parts_ptr, n_rows, d, d_per_split,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The same, of descriptors of x (T, i) and a (E·r, i)."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(2) * d_per_split
    total = bulk_project(
        values, factor, tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_C,
        start, tl.minimum(start + d_per_split, d), False, PRECISION, BLOCK_T, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    part_rows = tl.program_id(2).to(tl.int64) * n_rows + rows
    places = parts_ptr + part_rows[:, None] * COLUMNS + columns[None, :]
    tl.store(places, total, mask=(rows < n_rows)[:, None] & (columns < COLUMNS)[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def gathered_shrink_kernel(
    parts_ptr, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, stride_wt, stride_wk, stride_it, stride_ik,
    SPLITS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add the splits in their order, and keep hidden (T, K, r) and mixed (T, E·r)."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_C
    columns = first_column + tl.arange(0, BLOCK_C)
    row_ok = rows < n_rows
    both_ok = row_ok[:, None] & (columns < COLUMNS)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        part_rows = rows + n_rows * split
        total += tl.load(parts_ptr + part_rows[:, None] * COLUMNS + columns[None, :], mask=both_ok, other=0.0)
    keep_shrink(
        total, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def persistent_shrink_kernel(
    x_ptr, a_ptr, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, d, stride_x,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `shrink_kernel`, each program walking every n-th tile."""
    blocks: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_rows, BLOCK_T) * blocks, tl.num_programs(0)):
        rows = (tile // blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        first_column = tile % blocks * BLOCK_C
        columns = first_column + tl.arange(0, BLOCK_C)
        row_ok = rows < n_rows
        total = project(
            x_ptr, a_ptr, rows, row_ok, columns, columns < COLUMNS, 0, d, d, stride_x, EVEN, PRECISION,
            BLOCK_T, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        keep_shrink(
            total, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, first_column,
            stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
        )  # fmt: skip


def split_shrink(
    x: Tensor,
    a: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor,
    mixed: Tensor,
    size: Sizes,
    splits: int,
    by_engine: bool = False,
) -> None:
    """Write hidden (T, K, r) and mixed (T, E·r), as `launches.shrink`, in two launches.

    Args:
        x: (T, i).
        a: (E, r, i) contiguous.
        weights: (T, K).
        indices: (T, K) or None.
        hidden: written.
        mixed: written.
        size: the tiles.
        splits: of the features, at most.
        by_engine: the copy engine brings the tiles.

    Raises:
        BackendError: it cannot bring them: see `bulk.py`.
    """
    (n_rows, d), columns = x.shape, mixed.shape[1]
    if not n_rows:
        return
    d_per_split = triton.cdiv(triton.cdiv(d, splits), size.block_d) * size.block_d
    splits = triton.cdiv(d, d_per_split)
    blocks = triton.cdiv(columns, size.block_c)
    parts = x.new_empty(splits, n_rows, columns, dtype=torch.float32)
    grid = (triton.cdiv(n_rows, size.block_t), blocks, splits)
    shared = {
        "COLUMNS": columns, "PRECISION": precision(),
        "BLOCK_T": size.block_t, "BLOCK_C": size.block_c, "BLOCK_D": size.block_d,
    }  # fmt: skip
    if by_engine:
        bulk_split_shrink_kernel[grid](
            tiles_of(x, size.block_t, size.block_d), tiles_of(a.flatten(0, 1), size.block_c, size.block_d),
            parts, n_rows, d, d_per_split, **shared, **size.options,
        )  # fmt: skip
    else:
        split_shrink_kernel[grid](
            x, a, parts, n_rows, d, x.stride(0), d_per_split, EVEN=d % size.block_d == 0, **shared, **size.options
        )
    gathered_shrink_kernel[(triton.cdiv(n_rows, 16), blocks)](
        parts, weights, indices, hidden, mixed, n_rows, *routing_strides(weights, indices),
        SPLITS=splits, COLUMNS=columns, RANK=a.shape[1], K=weights.shape[1], DENSE=indices is None,
        BLOCK_T=16, BLOCK_C=size.block_c, **Sizes(16, size.block_c, 0, 4, 1).options,
    )  # fmt: skip


def persistent_shrink(
    x: Tensor,
    a: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor,
    mixed: Tensor,
    size: Sizes,
    programs: int,
) -> None:
    """Write hidden (T, K, r) and mixed (T, E·r), as `launches.shrink`, with at most so many programs."""
    (n_rows, d), columns = x.shape, mixed.shape[1]
    tiles = triton.cdiv(n_rows, size.block_t) * triton.cdiv(columns, size.block_c)
    if not n_rows:
        return
    persistent_shrink_kernel[(min(programs, tiles),)](
        x, a, weights, indices, hidden, mixed, n_rows, d, x.stride(0), *routing_strides(weights, indices),
        COLUMNS=columns, RANK=a.shape[1], K=weights.shape[1], DENSE=indices is None,
        EVEN=d % size.block_d == 0, PRECISION=precision(),
        BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
    )  # fmt: skip
