"""A mixture as ScatterMoE forms one, written from its description (Tan et al. 2024, arXiv 2403.08245), not its code.

Tiles of 128 sorted rows; a product gathers its rows on load and writes them sorted or in the order of the slots. A tile
over several experts repeats its loop for each of them. One fixed tile size for every product; outputs of all slots are
kept, the gates act on them, and backward copies x and dy into sorted rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moa.kernels.plan import sort_slots
from moa.kernels.triton.thin import FUSED

TILE: dict[str, Any] = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4, **FUSED}


@triton.jit
def sorted_product_kernel(
    x_ptr, w_ptr, order_ptr, experts_ptr, out_ptr, n_slots, d_in, d_out, stride_we, stride_wi, stride_wo,
    FAN: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, N_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[place or slot] = x[place or slot // FAN] w[expert of the slot]."""
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ok = places < n_slots
    slots = tl.load(order_ptr + places, mask=ok, other=0)
    experts = tl.load(experts_ptr + places, mask=ok, other=N_EXPERTS)
    rows = slots // FAN if GATHER else places.to(tl.int64)
    outs = slots if SCATTER else places.to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < d_out
    inner = tl.arange(0, BLOCK_K)
    first = tl.min(experts)
    last = tl.max(tl.where(ok, experts, 0))
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for expert in range(first, last + 1):
        mine = ok & (experts == expert)
        for n in range(0, d_in, BLOCK_K):
            inner_ok = n + inner < d_in
            x_ptrs = x_ptr + rows[:, None] * d_in + (n + inner)[None, :]
            x = tl.load(x_ptrs, mask=mine[:, None] & inner_ok[None, :], other=0.0)
            w_ptrs = w_ptr + expert * stride_we + (n + inner)[:, None] * stride_wi + columns[None, :] * stride_wo
            w = tl.load(w_ptrs, mask=inner_ok[:, None] & column_ok[None, :], other=0.0)
            total = tl.dot(x, w, total)
    out_ptrs = out_ptr + outs[:, None] * d_out + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=ok[:, None] & column_ok[None, :])


@triton.jit
def sorted_gram_kernel(
    x_ptr, dy_ptr, offsets_ptr, out_ptr, d_in, d_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] = x[rows of e]ᵀ dy[rows of e]: one program walks all rows of its expert."""
    blocks = tl.cdiv(d_in, BLOCK_M)
    expert = tl.program_id(0) // blocks
    inner = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, stop, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        ok = rows < stop
        x = tl.load(
            x_ptr + rows[None, :] * d_in + inner[:, None], mask=(inner < d_in)[:, None] & ok[None, :], other=0.0
        )
        dy_ptrs = dy_ptr + rows[:, None] * d_out + columns[None, :]
        dy = tl.load(dy_ptrs, mask=ok[:, None] & (columns < d_out)[None, :], other=0.0)
        total = tl.dot(x, dy, total)
    out_ptrs = out_ptr + expert.to(tl.int64) * d_in * d_out + inner[:, None] * d_out + columns[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(inner < d_in)[:, None] & (columns < d_out)[None, :])


def _product(x: Tensor, w: Tensor, plan: Any, experts: Tensor, fan: int, gather: bool, scatter: bool) -> Tensor:
    """Return x w[e] for every slot, sorted or in the order of the slots: (T·K, o) of w (E, i, o), any strides."""
    n_slots, (n_experts, d_in, d_out) = len(plan.order), w.shape
    out = x.new_empty(n_slots, d_out)
    grid = (triton.cdiv(n_slots, TILE["BLOCK_M"]), triton.cdiv(d_out, TILE["BLOCK_N"]))
    sorted_product_kernel[grid](
        x, w, plan.order, experts, out, n_slots, d_in, d_out, *w.stride(),
        FAN=fan, GATHER=gather, SCATTER=scatter, N_EXPERTS=n_experts, **TILE,
    )  # fmt: skip
    return out


def _gram(x: Tensor, dy: Tensor, plan: Any, like: Tensor) -> Tensor:
    """Return each expert's x ᵀ dy (E, i, o) of sorted rows."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    d_in, d_out = x.shape[1], dy.shape[1]
    grid = (len(like) * triton.cdiv(d_in, TILE["BLOCK_M"]), triton.cdiv(d_out, TILE["BLOCK_N"]))
    sorted_gram_kernel[grid](x, dy, plan.offsets, out, d_in, d_out, **TILE)
    return out


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:  # type: ignore[override]
        k = indices.shape[1]
        plan = sort_slots(indices, len(a))
        experts = indices.flatten()[plan.order]
        hidden = _product(x, a.transpose(1, 2), plan, experts, k, True, False)  # (T·K, r), sorted
        expanded = _product(hidden, b, plan, experts, k, False, True).view(*indices.shape, -1)  # (T, K, o)
        ctx.save_for_backward(x, a, b, weights, hidden, expanded, experts)
        ctx.plan = plan
        return torch.bmm(weights[:, None].to(x.dtype), expanded).squeeze(1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, a, b, weights, hidden, expanded, experts = ctx.saved_tensors
        plan, k = ctx.plan, weights.shape[1]
        to_weights = torch.bmm(expanded, dy[:, :, None]).squeeze(2).to(weights.dtype)
        sorted_dy = dy[plan.rows] * weights.flatten()[plan.order, None].to(dy.dtype)  # (T·K, o)
        to_b = _gram(hidden, sorted_dy, plan, b)
        to_hidden = _product(sorted_dy, b.transpose(1, 2), plan, experts, k, False, False)  # (T·K, r)
        to_a = _gram(to_hidden, x[plan.rows], plan, a)
        to_x = _product(to_hidden, a, plan, experts, k, False, True).view(len(x), k, -1).sum(1)
        return to_x, to_a, to_b, to_weights, None


def scatter(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Return y (T, o) of x (T, i), a (E, r, i), b (E, r, o), weights and indices (T, K)."""
    return _Scatter.apply(x, a, b, weights, indices)  # type: ignore[no-any-return]
