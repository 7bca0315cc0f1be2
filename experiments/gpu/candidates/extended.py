"""The base product and its expand together: the expand added onto y, or the columns as more features of one product."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moa.kernels.triton.launches import precision
from moa.kernels.triton.thin import Sizes

from .bulk import tiles_of

GROUP = 8  # blocks of rows that are neighbours: their weights are read from cache


@triton.jit(do_not_specialize=["n_rows"])
def expand_onto_kernel(
    mixed_ptr, factor_ptr, out_ptr, n_rows, d,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t, n] += Σ_c mixed[t, c] factor[c, n]."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok, inner_ok = rows < n_rows, inner < d
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for first in range(0, COLUMNS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_ok = columns < COLUMNS
        mixed_ptrs = mixed_ptr + rows[:, None] * COLUMNS + columns[None, :]
        factor_ptrs = factor_ptr + columns[:, None].to(tl.int64) * d + inner[None, :]
        mixed = tl.load(mixed_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        factor = tl.load(factor_ptrs, mask=column_ok[:, None] & inner_ok[None, :], other=0.0)
        total = tl.dot(mixed, factor, total, input_precision=PRECISION)
    places = out_ptr + rows[:, None] * d + inner[None, :]
    ok = row_ok[:, None] & inner_ok[None, :]
    before = tl.load(places, mask=ok, other=0.0).to(tl.float32)
    tl.store(places, (before + total).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _grouped_tile(n_rows, d_out, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's block of rows and of outputs, walked in groups of rows."""
    down, across = tl.cdiv(n_rows, BLOCK_T), tl.cdiv(d_out, BLOCK_O)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    return group * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["n_rows"])
def extended_kernel(
    x_ptr, weight_ptr, mixed_ptr, factor_ptr, out_ptr, n_rows, d_in, d_out, stride_x,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = x weightᵀ + mixed factor in one accumulator."""
    down, across = _grouped_tile(n_rows, d_out, BLOCK_T, BLOCK_O, GROUP)
    rows = (down * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    outs = (across * BLOCK_O + tl.arange(0, BLOCK_O)).to(tl.int64)
    row_ok, out_ok = rows < n_rows, outs < d_out
    inner = tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + rows[:, None] * stride_x + inner[None, :]
    weight_ptrs = weight_ptr + outs[None, :] * d_in + inner[:, None]
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for n in range(0, d_in, BLOCK_I):
        ok = n + inner < d_in
        value = tl.load(x_ptrs + n, mask=row_ok[:, None] & ok[None, :], other=0.0)
        weight = tl.load(weight_ptrs + n, mask=ok[:, None] & out_ok[None, :], other=0.0)
        total = tl.dot(value, weight, total, input_precision=PRECISION)
    for first in range(0, COLUMNS, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        column_ok = columns < COLUMNS
        mixed_ptrs = mixed_ptr + rows[:, None] * COLUMNS + columns[None, :]
        mixed = tl.load(mixed_ptrs, mask=row_ok[:, None] & column_ok[None, :], other=0.0)
        factor_ptrs = factor_ptr + columns[:, None] * d_out + outs[None, :]
        factor = tl.load(factor_ptrs, mask=column_ok[:, None] & out_ok[None, :], other=0.0)
        total = tl.dot(mixed, factor, total, input_precision=PRECISION)
    places = out_ptr + rows[:, None] * d_out + outs[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=row_ok[:, None] & out_ok[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def bulk_extended_kernel(
    values, weight, mixed, factor, out, n_rows, d_in, d_out,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same, of descriptors: what is outside reads as 0, and is not written.

    Warps set apart for the copies do not compile here: neither triton 3.6 nor 3.9 takes a loop with another product
    beside it, for compute capability 9.0.
    """
    down, across = _grouped_tile(n_rows, d_out, BLOCK_T, BLOCK_O, GROUP)
    row, first_out = down * BLOCK_T, across * BLOCK_O
    total = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for n in range(0, d_in, BLOCK_I):
        total = tl.dot(values.load([row, n]), weight.load([first_out, n]).T, total, input_precision=PRECISION)
    for column in range(0, COLUMNS, BLOCK_C):
        total = tl.dot(mixed.load([row, column]), factor.load([column, first_out]), total, input_precision=PRECISION)
    out.store([row, first_out], total.to(out.dtype))


def added(mixed: Tensor, factor: Tensor, y: Tensor, size: Sizes) -> Tensor:
    """Return y (T, o) with mixed (T, E·r) factor (E, r, o) added to it, in place."""
    (n_rows, columns), d = mixed.shape, y.shape[1]
    if n_rows:
        expand_onto_kernel[(triton.cdiv(n_rows, size.block_t), triton.cdiv(d, size.block_d))](
            mixed, factor, y, n_rows, d, COLUMNS=columns, PRECISION=precision(),
            BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
        )  # fmt: skip
    return y


def extended(x: Tensor, weight: Tensor, mixed: Tensor, factor: Tensor, size: Sizes, outs: int, bulk: bool) -> Tensor:
    """Return x weightᵀ + mixed factor (T, o) of one kernel.

    Args:
        x: (T, i).
        weight: (o, i) contiguous.
        mixed: (T, E·r) contiguous.
        factor: (E, r, o) contiguous.
        size: the tiles: rows, columns, features of x.
        outs: features of y in a tile.
        bulk: the copy engine brings the tiles.

    Raises:
        BackendError: it cannot bring them.
    """
    (n_rows, d_in), d_out = x.shape, weight.shape[0]
    columns, factor = mixed.shape[1], factor.flatten(0, 1)
    out = x.new_empty(n_rows, d_out)
    if not n_rows:
        return out
    shared = {
        "COLUMNS": columns, "PRECISION": precision(), "GROUP": GROUP,
        "BLOCK_T": size.block_t, "BLOCK_C": size.block_c, "BLOCK_I": size.block_d, "BLOCK_O": outs,
    }  # fmt: skip
    grid = (triton.cdiv(n_rows, size.block_t) * triton.cdiv(d_out, outs),)
    if bulk:
        bulk_extended_kernel[grid](
            tiles_of(x, size.block_t, size.block_d), tiles_of(weight, outs, size.block_d),
            tiles_of(mixed, size.block_t, size.block_c), tiles_of(factor, size.block_c, outs),
            tiles_of(out, size.block_t, outs), n_rows, d_in, d_out, **shared, **size.options,
        )  # fmt: skip
    else:
        extended_kernel[grid](x, weight, mixed, factor, out, n_rows, d_in, d_out, x.stride(0), **shared, **size.options)
    return out
