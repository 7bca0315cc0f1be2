"""The `triton_grouped` engine: tiles of rows sorted by expert, for large E·r. Contract: see `concat.py`.

Rows are gathered on load; the gate is applied on load; each slot's product is written in the order of the rows and a
row's slots are added in fp32. Weight gradients are split into chunks of an expert's rows and added in order, so that
one hot expert is no serial tail. Grids cover the static bound ceil(T·K / block) + E: no host sync.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_low_rank as concat_engine
from .concat import slot_dot
from .plan import Plan, sort_slots
from .triton_kernels import FUSED, _project
from .triton_low_rank import on_device, precision, rows_of, why_not

__all__ = ["backward", "forward", "why_not"]

_TILE = 64  # slots of a product's tile
_CHUNK = 512  # slots that one program of a weight gradient adds up


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
def _gated(values_ptr, weights_ptr, slots, ok, columns, column_ok, s_t, s_k, RANK: tl.constexpr, K: tl.constexpr):
    """Return slot values (BLOCK_T, BLOCK_C) times their weights; exactly 0 where a weight is 0."""
    weight = tl.load(weights_ptr + slots // K * s_t + slots % K * s_k, mask=ok, other=0.0).to(tl.float32)
    places = (values_ptr + slots * RANK)[:, None] + columns[None, :]
    value = tl.load(places, mask=ok[:, None] & column_ok[None, :], other=0.0).to(tl.float32)
    return tl.where(weight[:, None] != 0.0, value * weight[:, None], 0.0).to(values_ptr.dtype.element_ty)


@triton.jit
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
    expert, first, stop = _tile(offsets_ptr, ends_ptr, tl.program_id(0), N_EXPERTS, EXPERTS, BLOCK_T)
    if expert >= N_EXPERTS:
        return
    places = first + tl.arange(0, BLOCK_T)
    ok = places < stop
    slots = tl.load(order_ptr + places, mask=ok, other=0)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    column_ok = columns < RANK
    factor = factor_ptr + expert.to(tl.int64) * RANK * d
    total = _project(
        x_ptr, factor, slots // K, ok, columns, column_ok, 0, d, d, stride_x, EVEN, PRECISION,
        BLOCK_T, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    out = (out_ptr + slots * RANK)[:, None] + columns[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@triton.jit
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
    expert, first, stop = _tile(offsets_ptr, ends_ptr, tl.program_id(0), N_EXPERTS, EXPERTS, BLOCK_T)
    if expert >= N_EXPERTS:
        return
    places = first + tl.arange(0, BLOCK_T)
    ok = places < stop
    slots = tl.load(order_ptr + places, mask=ok, other=0)
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


@triton.jit
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


@triton.jit
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


@triton.jit
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


class Groups:
    """A routing's plan with the tiles of each expert, and the launches over it."""

    def __init__(self, weights: Tensor, indices: Tensor, n_experts: int, rank: int) -> None:
        self.plan: Plan = sort_slots(indices, n_experts)
        self.weights, self.rank = weights, rank
        self.n_rows, self.k = indices.shape
        self.n_experts = n_experts
        self.block_c = min(64, max(16, triton.next_power_of_2(rank)))
        self.shared = {
            "N_EXPERTS": n_experts,
            "EXPERTS": triton.next_power_of_2(n_experts),
            "RANK": rank,
            "K": self.k,
            "PRECISION": precision(),
        }

    def ends(self, step: int) -> tuple[Tensor, int]:
        """Return each expert's past-last tile (E,) and the static bound of their number."""
        counts = self.plan.offsets.diff()
        tiles = torch.div(counts + step - 1, step, rounding_mode="floor").cumsum(0)
        return tiles, triton.cdiv(self.n_rows * self.k, step) + self.n_experts

    def shrink(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return each slot's x factorᵀ (T, K, r)."""
        out = x.new_empty(self.n_rows, self.k, self.rank)
        ends, tiles = self.ends(_TILE)
        d, block_d = x.shape[1], 128 // x.itemsize
        grouped_shrink_kernel[(tiles, triton.cdiv(self.rank, self.block_c))](
            x, factor, self.plan.order, self.plan.offsets, ends, out, d, x.stride(0), **self.shared,
            EVEN=d % block_d == 0, BLOCK_T=_TILE, BLOCK_C=self.block_c, BLOCK_D=block_d,
            num_warps=4, num_stages=3, **FUSED,
        )  # fmt: skip
        return out

    def expand(self, values: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Return each row's Σ_j weight_j values_j factor[e_j] (+ bias), (T, d)."""
        d = factor.shape[-1]
        parts = values.new_empty(self.n_rows * self.k, d)
        ends, tiles = self.ends(_TILE)
        grouped_expand_kernel[(tiles, triton.cdiv(d, 128))](
            values, self.weights, factor, self.plan.order, self.plan.offsets, ends, parts, d, *self.weights.stride(),
            **self.shared, BLOCK_T=_TILE, BLOCK_C=min(self.block_c, 128 // values.itemsize), BLOCK_D=128,
            num_warps=4, num_stages=2, **FUSED,
        )  # fmt: skip
        out = values.new_empty(self.n_rows, d)
        combine_kernel[(self.n_rows, triton.cdiv(d, 1024))](
            parts, bias, out, d, K=self.k, HAS_BIAS=bias is not None, BLOCK_D=1024, **FUSED
        )
        return out

    def gram(self, values: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """Return each expert's Σ over its slots of (weight · values)ᵀ right, (E, r, d)."""
        d = right.shape[1]
        ends, chunks = self.ends(_CHUNK)
        parts = right.new_empty(chunks, self.rank, d, dtype=torch.float32)
        grouped_gram_kernel[(chunks, triton.cdiv(self.rank, self.block_c), triton.cdiv(d, 128))](
            values, self.weights, right, self.plan.order, self.plan.offsets, ends, parts, d, right.stride(0),
            *self.weights.stride(), **self.shared, CHUNK=_CHUNK,
            BLOCK_T=128 // right.itemsize, BLOCK_C=self.block_c, BLOCK_D=128,
            num_warps=4, num_stages=3, **FUSED,
        )  # fmt: skip
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        size = self.rank * d
        grid = (self.n_experts, triton.cdiv(size, 1024))
        add_chunks_kernel[grid](parts, ends, out, size, BLOCK=1024, **FUSED)
        return out


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    if indices is None or not x.shape[0]:  # every row has every expert, or there are no rows: nothing to sort
        return concat_engine.forward(x, a, b, weights, indices, base, bias)
    x = rows_of(x)
    with on_device(x):
        groups = Groups(weights, indices, a.shape[0], a.shape[1])
        hidden = groups.shrink(x, a.contiguous())
        y = groups.expand(hidden, b.contiguous(), bias)
    return (y if base is None else y.addmm_(x, base.T)), hidden


def backward(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor | None,
    base: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, a, b, weights that `needs` names, in this order."""
    if indices is None or not grad.shape[0]:
        return concat_engine.backward(grad, x, a, b, weights, indices, hidden, base, needs)
    need_x, need_a, need_b, need_weights = needs
    grad = rows_of(grad)
    found: list[Tensor] = []
    with on_device(grad):
        groups = Groups(weights, indices, a.shape[0], a.shape[1])
        through = need_x or need_a or need_weights
        grad_slots = groups.shrink(grad, b.contiguous()) if through else None
        if need_x:
            assert grad_slots is not None
            grad_x = groups.expand(grad_slots, a.contiguous(), None)
            found.append(grad_x if base is None else grad_x.addmm_(grad, base))
        if need_a:
            assert grad_slots is not None and x is not None
            found.append(groups.gram(grad_slots, rows_of(x), a))
        if need_b:
            assert hidden is not None
            found.append(groups.gram(hidden, grad, b))
        if need_weights:
            assert grad_slots is not None and hidden is not None
            found.append(slot_dot(grad_slots, hidden, weights))
    return found
