"""Triton kernels over tiles of slots that are sorted by expert: shrink, expand, their gradients. No atomics.

Rows are gathered on load and the gate is applied on load. Launches: `triton_grouped.py`.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import triton
import triton.language as tl

from .launcher import launched
from .thin import project


@triton.jit
def _tile(offsets_ptr, ends_ptr, tile, N_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr):
    """Return the expert of a tile (N_EXPERTS past the last one) and its first and past-last sorted places."""
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(ends_ptr + experts, mask=experts < N_EXPERTS, other=1 << 30)
    expert = tl.sum((ends <= tile).to(tl.int32))
    known = expert < N_EXPERTS
    before = tl.load(ends_ptr + expert - 1, mask=known & (expert > 0), other=0)
    first = tl.load(offsets_ptr + expert, mask=known, other=0) + (tile - before) * STEP
    last = tl.load(offsets_ptr + expert + 1, mask=known, other=0)
    return expert, first, tl.minimum(first + STEP, last)


@triton.jit
def _slots_of(
    order_ptr,
    offsets_ptr,
    ends_ptr,
    N_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Return the expert of this program's tile (N_EXPERTS past the last one), its slots and which of them there are."""
    expert, first, stop = _tile(offsets_ptr, ends_ptr, tl.program_id(0), N_EXPERTS, EXPERTS, BLOCK_T)
    places = first + tl.arange(0, BLOCK_T)
    ok = places < stop
    return expert, tl.load(order_ptr + places, mask=ok, other=0), ok


@triton.jit
def _gated(values_ptr, weights_ptr, slots, ok, columns, column_ok, s_t, s_k, RANK: tl.constexpr, K: tl.constexpr):
    """Return slot values (BLOCK_T, BLOCK_C) times their weights; exactly 0 where a weight is 0."""
    weight = tl.load(weights_ptr + slots // K * s_t + slots % K * s_k, mask=ok, other=0.0).to(tl.float32)
    places = (values_ptr + slots * RANK)[:, None] + columns[None, :]
    value = tl.load(places, mask=ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
    return tl.where(weight[:, None] != 0.0, value * weight[:, None], 0.0).to(values_ptr.dtype.element_ty)


@launched()
def grouped_shrink_kernel(
    x_ptr,
    factor_ptr,
    order_ptr,
    offsets_ptr,
    ends_ptr,
    out_ptr,
    d,
    stride_x,
    N_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[slot] = x[slot // K] factor[expert of slot]ᵀ: (T·K, r), in the order of the slots."""
    expert, slots, ok = _slots_of(order_ptr, offsets_ptr, ends_ptr, N_EXPERTS, EXPERTS, BLOCK_T)
    if expert >= N_EXPERTS:
        return
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < RANK
    factor = factor_ptr + expert.to(tl.int64) * RANK * d
    total = project(
        x_ptr, factor, slots // K, ok, columns, column_ok, 0, d, d, stride_x, EVEN, PRECISION,
        BLOCK_T, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    out = (out_ptr + slots * RANK)[:, None] + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@launched()
def grouped_expand_kernel(
    values_ptr,
    weights_ptr,
    factor_ptr,
    order_ptr,
    offsets_ptr,
    ends_ptr,
    out_ptr,
    d,
    stride_wt,
    stride_wk,
    N_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[slot] = weight · values[slot] factor[expert of slot]: (T·K, d), in the order of the slots."""
    expert, slots, ok = _slots_of(order_ptr, offsets_ptr, ends_ptr, N_EXPERTS, EXPERTS, BLOCK_T)
    if expert >= N_EXPERTS:
        return
    inner = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inner_ok = inner < d
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for c in range(0, RANK, BLOCK_C):
        columns = c + tl.arange(0, BLOCK_C)
        column_ok = columns < RANK
        value = _gated(values_ptr, weights_ptr, slots, ok, columns, column_ok, stride_wt, stride_wk, RANK, K)
        factor_ptrs = factor_ptr + (expert.to(tl.int64) * RANK + columns)[:, None] * d + inner[None, :]
        factor = tl.load(factor_ptrs, mask=column_ok[:, None] & inner_ok[None, :], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
    out = (out_ptr + slots * d)[:, None] + inner[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=ok[:, None] & inner_ok[None, :])


@launched()
def combine_kernel(parts_ptr, bias_ptr, out_ptr, d, K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[t] = Σ_j parts[t, j] (+ bias), in fp32 and in the order of the slots."""
    row = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = inner < d
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for j in range(K):
        total += tl.load(parts_ptr + (row * K + j) * d + inner, mask=ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + inner, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * d + inner, total.to(out_ptr.dtype.element_ty), mask=ok)


@launched()
def grouped_gram_kernel(
    values_ptr,
    weights_ptr,
    right_ptr,
    order_ptr,
    offsets_ptr,
    ends_ptr,
    out_ptr,
    d,
    stride_right,
    stride_wt,
    stride_wk,
    N_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[chunk] = Σ over the chunk's slots of (weight · values[slot])ᵀ right[slot // K]: (chunks, r, d) fp32."""
    expert, start, stop = _tile(offsets_ptr, ends_ptr, tl.program_id(0), N_EXPERTS, EXPERTS, CHUNK)
    if expert >= N_EXPERTS:
        return
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inner = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    column_ok = columns < RANK
    inner_ok = inner < d
    total = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for first in range(start, stop, BLOCK_T):
        places = first + tl.arange(0, BLOCK_T)
        ok = places < stop
        slots = tl.load(order_ptr + places, mask=ok, other=0)
        left = _gated(values_ptr, weights_ptr, slots, ok, columns, column_ok, stride_wt, stride_wk, RANK, K)
        right_ptrs = (right_ptr + slots // K * stride_right)[:, None] + inner[None, :]
        right = tl.load(right_ptrs, mask=ok[:, None] & inner_ok[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    out = out_ptr + (tl.program_id(0).to(tl.int64) * RANK + columns)[:, None] * d + inner[None, :]
    tl.store(out, total, mask=column_ok[:, None] & inner_ok[None, :])


@launched()
def add_chunks_kernel(parts_ptr, ends_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """out[e] = Σ of the chunks of expert e, in their order; 0 for an expert without rows."""
    expert = tl.program_id(0)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = places < size
    first = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends_ptr + expert)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    part_ptrs = parts_ptr + first.to(tl.int64) * size + places
    for _ in range(first, last):
        total += tl.load(part_ptrs, mask=ok, other=0.0)
        part_ptrs += size
    tl.store(out_ptr + expert.to(tl.int64) * size + places, total.to(out_ptr.dtype.element_ty), mask=ok)
