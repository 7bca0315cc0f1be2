"""The shrink with its router: logits, top-k and softmax ride in the pass over x. For `gated_linear` on a GPU.

One read of x serves the experts' hidden values and the router's logits; apart, the router reads x again and four small
kernels follow. Router weights are fp32: against a 16-bit x they are multiplied as the sum of two 16-bit numbers, so
that near-ties are decided as an fp32 router decides them.
"""

# mypy: disable-error-code="no-untyped-def"
# Kernel arguments other than constants have no types in Python.
from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import decode
from .launcher import launched
from .launches import expand, on_device, precision, rows_of, shrink_sizes
from .thin import Sizes, tile_of
from .tiles import cdiv, next_power_of_2


@triton.jit
def _next_choice(left, experts):
    """Return the greatest value of each row, its expert, and the values without it."""
    value = tl.max(left, axis=1)
    expert = tl.argmax(left, axis=1)
    return value, expert, tl.where(experts[None, :] == expert[:, None], float("-inf"), left)


@launched(do_not_specialize=["n_rows"])
def routed_shrink_kernel(
    x_ptr,
    a_ptr,
    gate_ptr,
    logits_ptr,
    weights_ptr,
    indices_ptr,
    hidden_ptr,
    mixed_ptr,
    n_rows,
    d,
    stride_x,
    scaling,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
    N_EXPERTS: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """logits = x gateᵀ (T, E); the k largest and their softmax (T, K); hidden (T, K, r) and mixed (T, E·r) of those."""
    block, rows, columns, row_ok, column_ok = tile_of(n_rows, COLUMNS, BLOCK_T, BLOCK_C)
    experts = tl.arange(0, BLOCK_E)
    inner = tl.arange(0, BLOCK_D)
    expert_ok = experts < N_EXPERTS
    total = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    # Every block of columns forms all logits: they are few, and no block then waits for another.
    logits = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float32)
    value_ptrs = x_ptr + rows[:, None] * stride_x + inner[None, :]
    factor_ptrs = a_ptr + columns[None, :].to(tl.int64) * d + inner[:, None]
    gate_ptrs = gate_ptr + experts[None, :] * d + inner[:, None]
    for n in range(0, d, BLOCK_D):
        if EVEN:
            value = tl.load(value_ptrs + n, mask=row_ok[:, None], other=0.0)
            factor = tl.load(factor_ptrs + n, mask=column_ok[None, :], other=0.0)
            gate = tl.load(gate_ptrs + n, mask=expert_ok[None, :], other=0.0)
        else:
            ok = n + inner < d
            value = tl.load(value_ptrs + n, mask=row_ok[:, None] & ok[None, :], other=0.0)
            factor = tl.load(factor_ptrs + n, mask=column_ok[None, :] & ok[:, None], other=0.0)
            gate = tl.load(gate_ptrs + n, mask=expert_ok[None, :] & ok[:, None], other=0.0)
        total = tl.dot(value, factor, total, input_precision=PRECISION)
        if SPLIT:
            high = gate.to(value.dtype)
            logits = tl.dot(value, high, logits)
            logits = tl.dot(value, (gate - high.to(tl.float32)).to(value.dtype), logits)
        else:
            logits = tl.dot(value, gate, logits, input_precision="ieee")
    if block == 0:
        places = (logits_ptr + rows * N_EXPERTS)[:, None] + experts[None, :]
        tl.store(places, logits, mask=row_ok[:, None] & expert_ok[None, :])
    known = tl.where(expert_ok[None, :], logits, float("-inf"))
    greatest = tl.max(known, axis=1)
    left = known
    mass = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for _ in tl.static_range(K):
        value, expert, left = _next_choice(left, experts)
        mass += tl.exp(value - greatest)
    left = known
    scale = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    hidden = total.to(hidden_ptr.dtype.element_ty)
    for j in tl.static_range(K):
        value, expert, left = _next_choice(left, experts)
        weight = tl.exp(value - greatest) / mass
        if block == 0:
            tl.store(weights_ptr + rows * K + j, weight, mask=row_ok)
            tl.store(indices_ptr + rows * K + j, expert.to(tl.int64), mask=row_ok)
        chosen = (expert[:, None] == (columns // RANK)[None, :]) & column_ok[None, :]
        scale = tl.where(chosen, (weight * scaling)[:, None], scale)
        slot_ptrs = (hidden_ptr + rows * (K * RANK))[:, None] + (j * RANK + columns % RANK)[None, :]
        tl.store(slot_ptrs, hidden, mask=chosen & row_ok[:, None])
    mixed = tl.where(scale != 0.0, total * scale, 0.0).to(mixed_ptr.dtype.element_ty)
    places = (mixed_ptr + rows * COLUMNS)[:, None] + columns[None, :]
    tl.store(places, mixed, mask=row_ok[:, None] & column_ok[None, :])


def routed_sizes(n_rows: int, columns: int, itemsize: int) -> Sizes:
    """Return the tiles: the shrink's with fewer warps and stages, which leave registers for the second sum."""
    return replace(shrink_sizes(n_rows, columns, itemsize), warps=4, stages=2)


def routed(
    x: Tensor,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    k: int,
    scaling: float,
    base: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Return y (T, o), logits (T, E), weights (T, K), indices (T, K) and hidden (T, K, r) of a gate and its mixture.

    None for few rows, which have launches of their own.

    Args:
        x: (T, i).
        gate: (E, i), fp32 or x's dtype.
        a: (E, r, i) in x's dtype.
        b: (E, r, o) in x's dtype.
        k: experts per row.
        scaling: on every expert.
        base: (o, i) in x's dtype, or None.
        bias: (o,) or None.
    """
    if x.shape[0] <= decode.MAX_ROWS:
        return None
    x = rows_of(x)
    (n_rows, d), (n_experts, rank, _) = x.shape, a.shape
    columns = n_experts * rank
    gate = gate.float().contiguous()
    logits, weights = (x.new_empty(n_rows, width, dtype=torch.float32) for width in (n_experts, k))
    indices = x.new_empty(n_rows, k, dtype=torch.int64)
    hidden, mixed = x.new_empty(n_rows, k, rank), x.new_empty(n_rows, columns)
    size = routed_sizes(n_rows, columns, x.itemsize)
    with on_device(x):
        routed_shrink_kernel[(cdiv(n_rows, size.block_t) * cdiv(columns, size.block_c),)](
            x, a.contiguous(), gate, logits, weights, indices, hidden, mixed, n_rows, d, x.stride(0), scaling,
            COLUMNS=columns, RANK=rank, N_EXPERTS=n_experts, K=k, SPLIT=x.dtype != torch.float32,
            EVEN=d % size.block_d == 0, PRECISION=precision(), BLOCK_T=size.block_t, BLOCK_C=size.block_c,
            BLOCK_E=max(16, next_power_of_2(n_experts)), BLOCK_D=size.block_d,
            **size.options,
        )  # fmt: skip
        y = expand(mixed, b, bias)
    if base is not None:
        y.addmm_(x, base.T)
    return y, logits, weights, indices, hidden
