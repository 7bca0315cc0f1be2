"""The `triton_concat` engine: every expert in one thin product, on a GPU. Contract: `engine.py` of the kernels.

Forward: shrink (one pass over x, the gate in its epilogue), expand. Backward: unmix (one pass over dy), expand for dx,
and one split product each for da and db with a second reduction.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..engine import Gradients, Operands
from . import decode
from .launches import expand, gram, on_device, precision, routing_strides, rows_of, shrink, unmix
from .routed import routed

__all__ = ["backward", "forward", "routed", "why_not"]


def why_not() -> str | None:
    """Return None: with triton and a device it runs."""
    return None


def forward(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), as `concat.forward`."""
    x = rows_of(operands.x)
    a, b, weights, indices = operands.a.contiguous(), operands.b.contiguous(), operands.weights, operands.indices
    n_experts, rank, _ = a.shape
    n_rows, k = weights.shape
    with on_device(x):
        if 0 < n_rows <= decode.MAX_ROWS:
            strides = routing_strides(weights, indices)
            y, hidden = decode.mix_few_rows(x, a, b, weights, indices, operands.bias, strides, precision())
        else:
            hidden = x.new_empty(n_rows, k, rank)
            mixed = x.new_empty(n_rows, n_experts * rank)
            shrink(x, a, weights, indices, hidden, mixed)
            y = expand(mixed, b, operands.bias)
    if operands.base is not None:
        y.addmm_(x, operands.base.T)
    return y, hidden


def backward(grad: Tensor, operands: Operands, hidden: Tensor, needs: Sequence[bool]) -> Gradients:
    """Return the gradients of x, a, b, weights, None where `needs` does not ask for one."""
    grad = rows_of(grad)
    a, b = operands.a, operands.b
    need_x, need_a, need_b, need_weights = needs
    grad_x = grad_a = grad_b = None
    with on_device(grad):
        grad_hidden, mixed, grad_weights = unmix(
            grad, b.contiguous(), operands.weights, operands.indices, hidden, need_x or need_a, need_b, need_weights
        )  # (T, E·r), (T, E·r), (T, K)
        if need_x and grad_hidden is not None:
            grad_x = expand(grad_hidden, a, None)
            if operands.base is not None:
                grad_x.addmm_(grad, operands.base)
        if need_a and grad_hidden is not None:
            grad_a = gram(grad_hidden, rows_of(operands.x), a)
        if mixed is not None:
            grad_b = gram(mixed, grad, b)
    return grad_x, grad_a, grad_b, grad_weights
