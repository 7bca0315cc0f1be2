"""The `triton_grouped` engine: tiles of rows sorted by expert, for large E·r. Contract: `engine.py` of the kernels.

Each slot's product is written in the order of the rows and a row's slots are added in fp32. Weight gradients are split
into chunks of an expert's rows and added in order, so that one overloaded expert does not serialise the kernel. Grids
cover the static bound ceil(T·K / block) + E: no host sync.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import concat
from ..concat import slot_dot
from ..engine import Gradients, Operands
from ..plan import Plan, sort_slots
from . import by_expert, triton_concat
from .launches import on_device, precision, rows_of
from .thin import FUSED, Sizes
from .tiles import cdiv, next_power_of_2
from .triton_concat import why_not

__all__ = ["backward", "forward", "slot_gradients", "slot_products", "why_not"]

_CHUNK = 512  # slots that one program of a weight gradient adds up


def shrink_sizes(rank: int, itemsize: int) -> Sizes:
    """Return the tiles of a product over features: slots, ranks, features."""
    return Sizes(64, _ranks(rank), 128 // itemsize, _warps(itemsize), 3)


def expand_sizes(rank: int, itemsize: int) -> Sizes:
    """Return the tiles of a product over ranks."""
    return Sizes(64, min(_ranks(rank), 128 // itemsize), 128, _warps(itemsize), 2)


def gram_sizes(rank: int, itemsize: int) -> Sizes:
    """Return the tiles of a weight gradient, whose product is over slots."""
    return Sizes(128 // itemsize, _ranks(rank), 128, _warps(itemsize), 3)


def _warps(itemsize: int) -> int:
    return 8 if itemsize == 4 else 4  # exact fp32 products run without matrix units: with four warps their sums spill


def _ranks(rank: int) -> int:
    return min(64, max(16, next_power_of_2(rank)))


class Groups:
    """A routing's plan with the tiles of each expert, and the launches over it."""

    def __init__(self, weights: Tensor, indices: Tensor, n_experts: int, rank: int) -> None:
        self.plan: Plan = sort_slots(indices, n_experts)
        self.weights, self.rank = weights, rank
        self.n_rows, self.k = indices.shape
        self.n_experts = n_experts
        self.shared = {
            "N_EXPERTS": n_experts,
            "EXPERTS": next_power_of_2(n_experts),
            "RANK": rank,
            "K": self.k,
            "PRECISION": precision(),
        }

    def ends(self, step: int) -> tuple[Tensor, int]:
        """Return each expert's past-last tile (E,) and the static bound of their number."""
        counts = self.plan.offsets.diff()
        tiles = torch.div(counts + step - 1, step, rounding_mode="floor").cumsum(0)
        return tiles, cdiv(self.n_rows * self.k, step) + self.n_experts

    def shrink(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return each slot's x factorᵀ (T, K, r)."""
        out = x.new_empty(self.n_rows, self.k, self.rank)
        size = shrink_sizes(self.rank, x.itemsize)
        ends, tiles = self.ends(size.block_t)
        d = x.shape[1]
        by_expert.grouped_shrink_kernel[(tiles, cdiv(self.rank, size.block_c))](
            x, factor, self.plan.order, self.plan.offsets, ends, out, d, x.stride(0), **self.shared,
            EVEN=d % size.block_d == 0, BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d,
            **size.options,
        )  # fmt: skip
        return out

    def expand(self, values: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        """Return each row's Σ_j weight_j values_j factor[e_j] (+ bias), (T, d)."""
        d = factor.shape[-1]
        parts = values.new_empty(self.n_rows * self.k, d)
        size = expand_sizes(self.rank, values.itemsize)
        ends, tiles = self.ends(size.block_t)
        by_expert.grouped_expand_kernel[(tiles, cdiv(d, size.block_d))](
            values, self.weights, factor, self.plan.order, self.plan.offsets, ends, parts, d, *self.weights.stride(),
            **self.shared, BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
        )  # fmt: skip
        out = values.new_empty(self.n_rows, d)
        by_expert.combine_kernel[(self.n_rows, cdiv(d, 1024))](
            parts, bias, out, d, K=self.k, HAS_BIAS=bias is not None, BLOCK_D=1024, **FUSED
        )
        return out

    def gram(self, values: Tensor, right: Tensor, like: Tensor) -> Tensor:
        """Return each expert's Σ over its slots of (weight · values)ᵀ right, (E, r, d)."""
        d = right.shape[1]
        size = gram_sizes(self.rank, right.itemsize)
        ends, chunks = self.ends(_CHUNK)
        parts = right.new_empty(chunks, self.rank, d, dtype=torch.float32)
        grid = (chunks, cdiv(self.rank, size.block_c), cdiv(d, size.block_d))
        by_expert.grouped_gram_kernel[grid](
            values, self.weights, right, self.plan.order, self.plan.offsets, ends, parts, d, right.stride(0),
            *self.weights.stride(), **self.shared, CHUNK=_CHUNK,
            BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d, **size.options,
        )  # fmt: skip
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        total = self.rank * d
        by_expert.add_chunks_kernel[(self.n_experts, cdiv(total, 1024))](parts, ends, out, total, BLOCK=1024, **FUSED)
        return out


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    x, a, indices = operands.x, operands.a, operands.indices
    if indices is None or not x.shape[0]:  # every row has every expert, or there are no rows: nothing to sort
        return triton_concat.forward(operands)
    x = rows_of(x)
    with on_device(x):
        groups = Groups(operands.weights, indices, a.shape[0], a.shape[1])
        hidden = groups.shrink(x, a.contiguous())
        y = groups.expand(hidden, operands.b.contiguous(), operands.bias)
    return (y if operands.base is None else y.addmm_(x, operands.base.T)), hidden


def backward(grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of x, a, b, weights, None where `needs` does not ask for one."""
    a, b, weights, indices = operands.a, operands.b, operands.weights, operands.indices
    if indices is None or not grad.shape[0]:
        return triton_concat.backward(grad, operands, hidden, needs)
    need_x, need_a, need_b, need_weights = needs
    grad = rows_of(grad)
    grad_x = grad_a = grad_b = grad_weights = None
    with on_device(grad):
        groups = Groups(weights, indices, a.shape[0], a.shape[1])
        if need_x or need_a or need_weights:
            grad_slots = groups.shrink(grad, b.contiguous())  # (T, K, r)
            if need_x:
                grad_x = groups.expand(grad_slots, a.contiguous(), None)
                if operands.base is not None:
                    grad_x.addmm_(grad, operands.base)
            if need_a:
                grad_a = groups.gram(grad_slots, rows_of(operands.x), a)
            if need_weights:
                grad_weights = slot_dot(grad_slots, hidden, weights)
        if need_b:
            grad_b = groups.gram(hidden, grad, b)
    return grad_x, grad_a, grad_b, grad_weights


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), see `SlotEngine`."""
    if not x.shape[0]:
        return concat.slot_products(x, factors, indices)
    with on_device(x):
        return _unweighted(x, factors, indices).shrink(rows_of(x), factors.contiguous())


def slot_gradients(
    grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` asks for, see `SlotEngine`."""
    if not grad.shape[0]:
        return concat.slot_gradients(grad, x, factors, indices, needs)
    found: list[Tensor] = []
    with on_device(grad):
        groups = _unweighted(grad, factors, indices)
        if needs[0]:
            found.append(groups.expand(grad, factors.contiguous(), None))
        if needs[1]:
            assert x is not None
            found.append(groups.gram(grad, rows_of(x), factors))
    return found


def _unweighted(like: Tensor, factors: Tensor, indices: Tensor) -> Groups:
    one = torch.ones((), dtype=torch.float32, device=like.device).expand(indices.shape)
    return Groups(one, indices, factors.shape[0], factors.shape[1])
