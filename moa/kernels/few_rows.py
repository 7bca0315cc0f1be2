"""A mixture of few rows, as in decoding and short training steps, where the number of calls is what costs.

A sparse routing is made dense, (T, E) weights with 0 where an expert is not chosen: no gather, no scatter of
rank-sized values. `concat.py` offers this as the ability "few_rows".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import cast, cast_all, wide
from .engine import Gradients, Operands
from .scale import scale

# From this many rows on, casting whole weights to fp32 costs less than an emulated product.
_CAST_PAYS = 4


def few_rows(operands: Operands, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return y (T, o) in x's dtype, its mixture times scaling formed in a dtype. One row reads its own experts alone.

    Raises:
        IndexError, RuntimeError: an index names no expert.
    """
    x, a, b, weights, indices = operands.x, operands.a, operands.b, operands.weights, operands.indices
    n_rows = len(x)
    if indices is not None and n_rows == 1:
        chosen = indices.view(-1)
        a, b = a.index_select(0, chosen), b.index_select(0, chosen)  # (K, r, i), (K, r, o)
    elif indices is not None:
        weights = dense_weights(operands)
    mixed = F.linear(cast(x, dtype), cast(a, dtype).flatten(0, 1))  # (T, E·r)
    scale(mixed.view(n_rows, *a.shape[:2]), weights, onto_itself=True)
    up, base, bias = cast(b, dtype).flatten(0, 1), operands.base, operands.bias  # (E·r, o)
    if base is None:
        y = cast(mixed @ up if scaling == 1 else (mixed @ up).mul_(scaling), x.dtype)
        return y if bias is None else y.add_(cast(bias, y.dtype))
    if dtype == x.dtype:
        base, bias = cast_all(dtype, base, bias)
        return F.linear(x, base, bias).addmm_(mixed, up, alpha=scaling)
    late = dtype if n_rows >= _CAST_PAYS else x.dtype
    base, bias = cast_all(late, base, bias)
    return cast(F.linear(cast(x, late), base, bias).add_(mixed @ up, alpha=scaling), x.dtype)


def few_rows_forward(operands: Operands, scaling: float) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and the hidden values of all experts (T, E, r), for `few_rows_backward`.

    The operands are of one dtype.
    """
    x, a = operands.x, operands.a
    hidden = F.linear(x, a.flatten(0, 1)).view(len(x), *a.shape[:2])  # (T, E, r)
    mixed = scale(hidden, dense_weights(operands)).flatten(1)  # (T, E·r)
    up = operands.b.flatten(0, 1)  # (E·r, o)
    if operands.base is not None:
        y = F.linear(x, operands.base, operands.bias).addmm_(mixed, up, alpha=scaling)
    else:
        y = mixed @ up if scaling == 1 else (mixed @ up).mul_(scaling)
        y = y if operands.bias is None else y.add_(operands.bias)
    return y, hidden


def few_rows_backward(
    grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool], scaling: float
) -> Gradients:
    """Return the gradients of x, a, b and weights (T, K), None where `needs` does not ask for one."""
    a, b, indices = operands.a, operands.b, operands.indices
    need_x, need_a, need_b, need_weights = needs
    weights = dense_weights(operands)  # (T, E)
    scaled = weights if scaling == 1 else weights * scaling
    grad_x = grad_a = grad_b = grad_weights = None
    if need_x or need_a or need_weights:
        slots = F.linear(grad, b.flatten(0, 1)).view(len(grad), *b.shape[:2])  # (T, E, r)
        if need_weights:
            dtype = wide(hidden.dtype)
            dots = (cast(slots, dtype) * cast(hidden, dtype)).sum(-1)  # (T, E)
            dots = dots if indices is None else dots.gather(1, indices)  # (T, K)
            grad_weights = cast(dots if scaling == 1 else dots.mul_(scaling), weights.dtype)
        if need_x or need_a:
            to_hidden = scale(slots, scaled).flatten(1)  # (T, E·r)
            if need_x:
                grad_x = to_hidden @ a.flatten(0, 1)
                if operands.base is not None:
                    grad_x.addmm_(grad, operands.base)
            if need_a:
                grad_a = (to_hidden.T @ operands.x).view(a.shape)
    if need_b:
        grad_b = (scale(hidden, scaled).flatten(1).T @ grad).view(b.shape)
    return grad_x, grad_a, grad_b, grad_weights


def dense_weights(operands: Operands) -> Tensor:
    """Return the weights at their experts, (T, E), 0 elsewhere; repeated experts add."""
    weights, indices = operands.weights, operands.indices
    if indices is None:
        return weights
    return weights.new_zeros(len(weights), len(operands.a)).scatter_add_(1, indices, weights)
