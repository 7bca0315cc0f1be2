"""Unmix and the gram of dB in one launch: both walk dy by the same chunks of rows, and the second read hits L2."""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa.kernels.triton import thin
from moa.kernels.triton.launches import precision, routing_strides
from moa.kernels.triton.thin import Sizes, project

from .ends import keep_unmix


@triton.jit
def _mixed_of(
    hidden_ptr, weights_ptr, indices_ptr, rows, row_ok, columns, column_ok,
    stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return hidden · gate: (BLOCK_T, BLOCK_C) fp32.

    Slots are unrolled: only loops without a loop in them have their loads issued ahead.
    """
    both_ok = row_ok[:, None] & column_ok[None, :]
    experts = columns // RANK
    gate = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    hidden = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    if DENSE:
        places = rows[:, None] * stride_wt + experts[None, :] * stride_wk
        gate = tl.load(weights_ptr + places, mask=both_ok, other=0.0).to(tl.float32)
        places = rows[:, None] * COLUMNS + columns[None, :]
        hidden = tl.load(hidden_ptr + places, mask=both_ok, other=0.0).to(tl.float32)
    else:
        for j in tl.static_range(K):
            expert = tl.load(indices_ptr + rows * stride_it + j * stride_ik, mask=row_ok, other=-1)
            weight = tl.load(weights_ptr + rows * stride_wt + j * stride_wk, mask=row_ok, other=0.0)
            chosen = (expert[:, None] == experts[None, :]) & both_ok
            gate += tl.where(chosen, weight.to(tl.float32)[:, None], 0.0)
            places = rows[:, None] * (K * RANK) + (j * RANK + columns % RANK)[None, :]
            hidden = tl.where(chosen, tl.load(hidden_ptr + places, mask=chosen, other=0.0).to(tl.float32), hidden)
    return tl.where(gate != 0.0, hidden * gate, 0.0)


@triton.jit(do_not_specialize=["n_rows", "rows_per_chunk"])
def unmix_gram_kernel(
    grad_ptr, b_ptr, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, grad_weights_ptr, parts_ptr,
    n_rows, d, stride_grad, rows_per_chunk, stride_wt, stride_wk, stride_it, stride_ik,
    COLUMNS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    GRAM_T: tl.constexpr, GRAM_D: tl.constexpr,
):  # fmt: skip
    """Of each chunk of rows: some programs form dy bᵀ and what unmix keeps of it, the others (hidden · gate)ᵀ dy."""
    blocks: tl.constexpr = (COLUMNS + BLOCK_C - 1) // BLOCK_C
    unmixing = rows_per_chunk // BLOCK_T * blocks
    of_chunk = unmixing + tl.cdiv(d, GRAM_D) * blocks
    chunk, place = tl.program_id(0) // of_chunk, tl.program_id(0) % of_chunk
    start = chunk * rows_per_chunk
    block = place % blocks
    columns = block * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < COLUMNS
    if place < unmixing:
        rows = (start + place // blocks * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        total = project(
            grad_ptr, b_ptr, rows, rows < n_rows, columns, column_ok, 0, d, d, stride_grad, EVEN, PRECISION,
            BLOCK_T, BLOCK_C, BLOCK_D,
        )  # fmt: skip
        keep_unmix(
            total, weights_ptr, indices_ptr, hidden_ptr, grad_hidden_ptr, None, grad_weights_ptr,
            block, n_rows, rows, rows < n_rows, stride_wt, stride_wk, stride_it, stride_ik,
            COLUMNS, RANK, K, DENSE, False, BLOCK_T, BLOCK_C,
        )  # fmt: skip
    else:
        inner = (place - unmixing) // blocks * GRAM_D + tl.arange(0, GRAM_D)
        inner_ok = inner < d
        gram = tl.zeros((BLOCK_C, GRAM_D), dtype=tl.float32)
        stop = tl.minimum(start + rows_per_chunk, n_rows)
        for first in range(start, stop, GRAM_T):
            rows = (first + tl.arange(0, GRAM_T)).to(tl.int64)
            row_ok = rows < stop
            left = _mixed_of(
                hidden_ptr, weights_ptr, indices_ptr, rows, row_ok, columns, column_ok,
                stride_wt, stride_wk, stride_it, stride_ik, COLUMNS, RANK, K, DENSE, GRAM_T, BLOCK_C,
            ).to(grad_ptr.dtype.element_ty)  # fmt: skip
            right_ptrs = grad_ptr + rows[:, None] * stride_grad + inner[None, :]
            right = tl.load(right_ptrs, mask=row_ok[:, None] & inner_ok[None, :], other=0.0)
            gram = tl.dot(tl.trans(left), right, gram, input_precision=PRECISION)
        part = chunk.to(tl.int64) * COLUMNS
        places = parts_ptr + (part + columns[:, None]) * d + inner[None, :]
        tl.store(places, gram, mask=column_ok[:, None] & inner_ok[None, :])


def unmix_gram(
    grad: Tensor, b: Tensor, weights: Tensor, indices: Tensor | None, hidden: Tensor, size: Sizes, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return grad_hidden (T, E·r), grad_weights (T, K) and grad_b (E, r, o), no atomics, sums in a fixed order.

    Args:
        grad: dy (T, o).
        b: (E, r, o) contiguous.
        weights: (T, K).
        indices: (T, K) or None.
        hidden: (T, K, r), as the shrink kept it.
        size: tiles of unmix; gram's are as wide as the package's.
        chunk: rows that are walked together.

    Raises:
        ValueError: a chunk is not whole blocks of rows.
    """
    if chunk % size.block_t:
        raise ValueError(f"unmix_gram: chunks of {chunk} rows are not whole blocks of {size.block_t}.")
    (n_rows, d), (rank, k) = grad.shape, (b.shape[1], weights.shape[1])
    columns = b.shape[0] * rank
    blocks = triton.cdiv(columns, size.block_c)
    chunks = triton.cdiv(n_rows, chunk)
    grad_hidden = grad.new_empty(n_rows, columns)
    grad_weights = grad.new_empty(blocks, n_rows, k, dtype=torch.float32)
    parts = grad.new_empty(chunks, columns, d, dtype=torch.float32)
    gram_t, gram_d = 128 // grad.itemsize, 128
    if n_rows:
        of_chunk = (chunk // size.block_t + triton.cdiv(d, gram_d)) * blocks
        unmix_gram_kernel[(chunks * of_chunk,)](
            grad, b, weights, indices, hidden, grad_hidden, grad_weights, parts, n_rows, d, grad.stride(0), chunk,
            *routing_strides(weights, indices),
            COLUMNS=columns, RANK=rank, K=k, DENSE=indices is None, EVEN=d % size.block_d == 0, PRECISION=precision(),
            BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, GRAM_T=gram_t, GRAM_D=gram_d,
            **size.options,
        )  # fmt: skip
    grad_b = torch.empty_like(b)
    thin.add_splits_kernel[(triton.cdiv(grad_b.numel(), 1024),)](
        parts, grad_b, grad_b.numel(), chunks, BLOCK=1024, **thin.FUSED
    )
    return grad_hidden, (grad_weights[0] if blocks == 1 else grad_weights.sum(0)).to(weights.dtype), grad_b
