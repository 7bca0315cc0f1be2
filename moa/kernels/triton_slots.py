"""The grouped linear on a GPU: the tiles of the `triton_grouped` engine, without weights or the sum of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_grouped import Groups
from .triton_low_rank import on_device, rows_of


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), as `sorted_rows.slot_products`."""
    with on_device(x):
        return _unweighted(x, factors, indices).shrink(rows_of(x), factors.contiguous())


def slot_gradients(grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` names, as `sorted_rows.slot_gradients`."""
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
