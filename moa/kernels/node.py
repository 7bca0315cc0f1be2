"""One mixture as a node of the autograd graph, for eager code: what `ops.py` does, without the machinery of an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat import own_view
from . import ops
from .dtypes import cast, exact_dtypes
from .engine import Operands


class Mix(torch.autograd.Function):
    """`low_rank_mixture`, or `mixture_linear` with a base, of x (*rows, i) and a routing that broadcasts to it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        weights: Tensor,
        call: tuple[Tensor | None, Tensor | None, Tensor | None, float, torch.dtype, str],
    ) -> Tensor:
        """Return y (*rows, o); `call` is indices, base, bias, scaling, the dtype of y, engine: what has no gradient."""
        indices, base, bias, scaling, dtype, engine = call
        operands = ops.flatten(Operands(cast(x, dtype), a, b, weights, indices, base, bias))
        rows, routed, slots = operands.x, operands.weights, operands.indices
        with exact_dtypes(rows):
            chosen = ops.choose_for(rows, a, b, routed.shape[1], engine)
            ops.check_indices(rows, a, slots)
            y, hidden = ops.run_forward(ops.scaled(operands, scaling), chosen)
        need_x, need_a, need_b, need_weights = ctx.needs_input_grad[:4]
        # x is kept only for the gradient of a; hidden for those of b and the weights; the base for that of x.
        inner = hidden if need_b or need_weights else None
        ctx.save_for_backward(rows if need_a else None, a, b, routed, slots, inner, base if need_x else None)
        ctx.call = x.shape, x.dtype, weights.shape, scaling, chosen
        ctx.set_materialize_grads(False)
        return y if x.ndim == 2 else own_view(y, (*x.shape[:-1], y.shape[1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, a, b and weights, each where it is needed."""
        needs = ctx.needs_input_grad[:4]
        if grad is None or not any(needs):
            return None, None, None, None, None
        rows, a, b, weights, indices, hidden, base = ctx.saved_tensors
        x_shape, x_dtype, weights_shape, scaling, chosen = ctx.call
        with exact_dtypes(grad):
            flat = grad if grad.ndim == 2 else grad.reshape(-1, grad.shape[-1])
            operands = Operands(rows, a, b, weights, indices, base)
            to_x, to_a, to_b, to_weights = ops.run_backward(flat, ops.scaled(operands, scaling), hidden, needs, chosen)
            if to_weights is not None:
                to_weights = to_weights if scaling == 1 else to_weights * scaling
                to_weights = to_weights.view(*x_shape[:-1], to_weights.shape[1]).sum_to_size(weights_shape)
        if to_x is not None:
            to_x = cast(to_x.view(x_shape), x_dtype)
        return to_x, to_a, to_b, to_weights, None
