"""Shrink, unmix and gram whose tiles the bulk copy engine brings (TMA), with and without warps set apart for it."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moa.errors import BackendError
from moa.kernels.triton import thin
from moa.kernels.triton.launches import _PROGRAMS as PROGRAMS
from moa.kernels.triton.launches import precision, routing_strides
from moa.kernels.triton.thin import Sizes, tile_of

from .ends import keep_shrink, keep_unmix


@triton.jit
def bulk_project(
    values, factor, first_row, first_column, start, stop, SPECIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum values[row, n] · factor[column, n] over n = start … stop - 1: (BLOCK_T, BLOCK_C) fp32.

    Whole blocks are read; what is outside of a matrix reads as 0.
    """
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    for n in tl.range(start, stop, BLOCK_D, warp_specialize=SPECIAL):
        value = values.load([first_row, n])
        total = tl.dot(value, factor.load([first_column, n]).T, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["n_rows"])
def bulk_shrink_kernel(
    values, factor, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, n_rows, d,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr, SPECIAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `shrink_kernel`, of descriptors of x (T, i) and a (E·r, i)."""
    block, rows, _, row_ok, _ = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    first = tl.program_id(0) // ((COLUMNS + BLOCK_C - 1) // BLOCK_C) * BLOCK_T
    total = bulk_project(values, factor, first, block * BLOCK_C, 0, d, SPECIAL, PRECISION, BLOCK_T, BLOCK_C, BLOCK_D)
    keep_shrink(
        total, weights_ptr, indices_ptr, hidden_ptr, mixed_ptr, rows, row_ok, block * BLOCK_C,
        stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, BLOCK_T, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def bulk_unmix_kernel(
    values, factor, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, mixed_ptr, grad_weights_ptr, n_rows, d,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr, SPECIAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `unmix_kernel`, of descriptors of dy (T, o) and b (E·r, o)."""
    block, rows, _, row_ok, _ = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    first = tl.program_id(0) // ((COLUMNS + BLOCK_C - 1) // BLOCK_C) * BLOCK_T
    total = bulk_project(values, factor, first, block * BLOCK_C, 0, d, SPECIAL, PRECISION, BLOCK_T, BLOCK_C, BLOCK_D)
    keep_unmix(
        total, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, mixed_ptr, grad_weights_ptr,
        block, n_rows, rows, row_ok, stride_wt, stride_wk, stride_it, stride_ik,
        COLUMNS, RANK, K, DENSE, True, BLOCK_T, BLOCK_C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "rows_per_split"])
def bulk_gram_kernel(
    left, right, out_ptr, n_rows, d, rows_per_split,
    COLUMNS: tl.constexpr, SPECIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `gram_kernel`, of descriptors of left (T, E·r) and right (T, d). Splits are whole blocks of rows."""
    first_column, first_inner = tl.program_id(1) * BLOCK_C, tl.program_id(0) * BLOCK_D
    start = tl.program_id(2) * rows_per_split
    stop = tl.minimum(start + rows_per_split, n_rows)
    total = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for row in tl.range(start, stop, BLOCK_T, warp_specialize=SPECIAL):
        total = tl.dot(
            left.load([row, first_column]).T, right.load([row, first_inner]), total, input_precision=PRECISION
        )
    columns, inner = first_column + tl.arange(0, BLOCK_C), first_inner + tl.arange(0, BLOCK_D)
    split = tl.program_id(2).to(tl.int64) * COLUMNS
    places = out_ptr + (split + columns[:, None]) * d + inner[None, :]
    ok = (columns < COLUMNS)[:, None] & (inner < d)[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=ok)


def why_not(*values: Tensor) -> str | None:
    """Return why the copy engine cannot bring tiles of these matrices, or None."""
    for value in values:
        if value.stride(1) != 1 or value.stride(0) * value.itemsize % 16 or value.data_ptr() % 16:
            return f"rows of {tuple(value.shape)} with strides {value.stride()} do not begin on 16 bytes"
    return None


def tiles_of(values: Tensor, rows: int, features: int) -> TensorDescriptor:
    """Return a descriptor of a matrix in tiles.

    Raises:
        BackendError: its rows do not begin on 16 bytes.
    """
    if (reason := why_not(values)) is not None:
        raise BackendError(f"the copy engine: {reason}: use the package's launch.")
    return TensorDescriptor.from_tensor(values, [rows, features])


def shrink(
    x: Tensor,
    a: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor,
    mixed: Tensor,
    size: Sizes,
    special: bool,
) -> None:
    """Write hidden (T, K, r) and mixed (T, E·r), as `launches.shrink`.

    Args:
        x: (T, i).
        a: (E, r, i) contiguous.
        weights: (T, K).
        indices: (T, K) or None.
        hidden: written.
        mixed: written.
        size: the tiles.
        special: some warps do nothing but bring tiles; the compiler does so where `size` has four warps.

    Raises:
        BackendError: rows do not begin on 16 bytes.
    """
    (n_rows, d), columns = x.shape, mixed.shape[1]
    if not n_rows:
        return
    bulk_shrink_kernel[(triton.cdiv(n_rows, size.block_t) * triton.cdiv(columns, size.block_c),)](
        tiles_of(x, size.block_t, size.block_d), tiles_of(a.flatten(0, 1), size.block_c, size.block_d),
        weights, indices, hidden, mixed, n_rows, d, *routing_strides(weights, indices),
        COLUMNS=columns, RANK=a.shape[1], K=weights.shape[1], DENSE=indices is None, SPECIAL=special,
        PRECISION=precision(), BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
    )  # fmt: skip


def unmix(
    grad: Tensor, b: Tensor, weights: Tensor, indices: Tensor | None, hidden: Tensor, size: Sizes, special: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad_hidden (T, E·r), mixed (T, E·r) and grad_weights (T, K), as `launches.unmix` does of all three."""
    (n_rows, d), (rank, k) = grad.shape, (b.shape[1], weights.shape[1])
    columns = b.shape[0] * rank
    blocks = triton.cdiv(columns, size.block_c)
    grad_hidden, mixed = (grad.new_empty(n_rows, columns) for _ in range(2))
    parts = grad.new_empty(blocks, n_rows, k, dtype=torch.float32)
    if n_rows:
        bulk_unmix_kernel[(triton.cdiv(n_rows, size.block_t) * blocks,)](
            tiles_of(grad, size.block_t, size.block_d), tiles_of(b.flatten(0, 1), size.block_c, size.block_d),
            weights, indices, hidden, grad_hidden, mixed, parts, n_rows, d, *routing_strides(weights, indices),
            COLUMNS=columns, RANK=rank, K=k, DENSE=indices is None, SPECIAL=special,
            PRECISION=precision(), BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
        )  # fmt: skip
    return grad_hidden, mixed, (parts[0] if blocks == 1 else parts.sum(0)).to(weights.dtype)


def gram(left: Tensor, right: Tensor, like: Tensor, size: Sizes, special: bool) -> Tensor:
    """Return leftᵀ right (E, r, d) from left (T, E·r) and right (T, d), as `launches.gram`."""
    (n_rows, columns), d = left.shape, right.shape[1]
    programs = triton.cdiv(d, size.block_d) * triton.cdiv(columns, size.block_c)
    splits = max(1, min(PROGRAMS // programs, triton.cdiv(n_rows, 4 * size.block_t)))
    rows_per_split = triton.cdiv(triton.cdiv(n_rows, splits), size.block_t) * size.block_t
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    parts = left.new_empty(splits, columns, d, dtype=torch.float32)
    if not n_rows:
        return out.zero_()
    bulk_gram_kernel[(triton.cdiv(d, size.block_d), triton.cdiv(columns, size.block_c), splits)](
        tiles_of(left, size.block_t, size.block_c), tiles_of(right, size.block_t, size.block_d),
        parts, n_rows, d, rows_per_split,
        COLUMNS=columns, SPECIAL=special, PRECISION=precision(),
        BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
    )  # fmt: skip
    thin.add_splits_kernel[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), splits, BLOCK=1024, **thin.FUSED)
    return out
