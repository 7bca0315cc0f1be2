"""One mixture on flat rows by the engine that was chosen, and the op behind `low_rank_mixture` and `mixture_linear`.

Saved for backward beyond x: the hidden values of the chosen slots (T, K, r), the weights and the indices.
The op is opaque to `torch.compile`: a graph holds one node forward and one backward. Its machinery costs more than a
small layer's products, so that eager code has a node without it, in `node.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import own_view
from ..errors import ShapeError
from .dispatch import Chosen, choose
from .dtypes import cast, cast_all, exact_dtypes
from .engine import Ability, Gradients, Operands

# From this many rows on, casting whole weights to fp32 costs less than an emulated product.
_CAST_PAYS = 4
# Up to this many indices Python finds the least and the greatest sooner than a tensor op starts.
_FEW_INDICES = 128
# MOA_DEBUG=1 checks on a GPU what costs a sync there.
DEBUG = os.environ.get("MOA_DEBUG") == "1"


@torch.library.custom_op("moa::low_rank_mixture", mutates_args=())
def forward_op(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and the chosen slots' hidden values (T, K, r): see `low_rank_mixture`, `mixture_linear`."""
    check_indices(x, a, indices)
    with exact_dtypes(x):
        operands = Operands(x, a, b, weights, indices, base, bias)
        return run_forward(operands, choose_for(x, a, b, weights.shape[-1], engine))


def choose_for(rows: Tensor, a: Tensor, b: Tensor, k: int, engine: str, ability: Ability | None = None) -> Chosen:
    """Return the engine for rows (T, i or o), factors a (E, r, i) and b (E, r, o), and k experts per row."""
    return choose(engine, rows.shape[0], a.shape, b.shape[-1], k, rows.dtype, rows.device, ability)


def run_forward(operands: Operands, chosen: Chosen) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r), in the dtype of x, by the engine that was chosen."""
    dtype, engine = operands.x.dtype, chosen.engine
    if chosen.dtype == dtype:
        y, hidden = engine.forward(operands.cast(dtype))
        return y, hidden
    late = operands.base if operands.x.shape[0] < _CAST_PAYS else None
    early = operands if late is None else operands._replace(base=None)
    y, hidden = cast_all(dtype, *engine.forward(early.cast(chosen.dtype)))
    return (y if late is None else y.add_(F.linear(operands.x, cast(late, dtype)))), hidden


def compose(operands: Operands, chosen: Chosen, scaling: float = 1.0) -> Tensor:
    """Return y (*rows, o), its mixture times scaling, of plain tensors without autocast: x (*rows, i), weights alike.

    Few rows go through ops that have gradients; for others none is formed. With few rows, call overhead dominates.

    Raises:
        ShapeError: the routing's rows do not broadcast against x's, or an index names no expert.
    """
    if chosen.few:
        try:
            y: Tensor = chosen.engine.few_rows(operands, scaling, chosen.dtype)
            return y
        except (IndexError, RuntimeError):  # PyTorch checks bounds and shapes; checked again only to name them
            check_indices(operands.x, operands.a, operands.indices)
            flatten(operands)
            raise
    flat = flatten(operands)
    check_indices(flat.x, flat.a, flat.indices)
    y = run_forward(scaled(flat, scaling), chosen)[0]
    return y if operands.x.ndim == 2 else own_view(y, (*operands.x.shape[:-1], y.shape[1]))


def flatten(operands: Operands) -> Operands:
    """Return operands of flat rows, x (T, i), weights and indices (T, K), of x (*rows, i) and what broadcasts to it.

    Raises:
        ShapeError: the routing's rows do not broadcast against x's.
    """
    x, weights, indices = operands.x, operands.weights, operands.indices
    rows, k = x.shape[:-1], weights.shape[-1]
    if weights.shape[:-1] != rows:
        try:
            weights = weights.expand(*rows, k)
            indices = None if indices is None else indices.expand(*rows, k)
        except RuntimeError as error:
            raise ShapeError(
                f"low_rank_mixture: routing rows {tuple(weights.shape[:-1])} do not broadcast against "
                f"the rows of x {tuple(rows)}."
            ) from error
    elif len(rows) == 1:
        return operands
    indices = None if indices is None else indices.reshape(-1, k)
    return operands._replace(x=x.reshape(-1, x.shape[-1]), weights=weights.reshape(-1, k), indices=indices)


def scaled(operands: Operands, scaling: float) -> Operands:
    """Return operands whose weights (T, K) are multiplied by scaling."""
    return operands if scaling == 1 else operands._replace(weights=operands.weights * scaling)


@forward_op.register_fake
def _(x, a, b, weights, indices, base, bias, engine):
    hidden = x.new_empty(x.shape[0], weights.shape[-1], a.shape[1])
    return x.new_empty(x.shape[0], b.shape[-1]), hidden


@torch.library.custom_op("moa::low_rank_mixture_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor | None,
    base: Tensor | None,
    engine: str,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, a, b, weights that `needs` names, from grad (T, o) and what forward kept."""
    with exact_dtypes(grad):
        operands = Operands(x, a, b, weights, indices, base)  # type: ignore[arg-type]
        found = run_backward(grad, operands, hidden, needs, choose_for(grad, a, b, weights.shape[-1], engine))
    return [value for value in found if value is not None]


def run_backward(
    grad: Tensor, operands: Operands, hidden: Tensor | None, needs: Sequence[bool], chosen: Chosen
) -> Gradients:
    """Return the gradients of x, a, b, weights, each in its own dtype, None where `needs` does not ask for it."""
    own = (grad.dtype, operands.a.dtype, operands.b.dtype, operands.weights.dtype)
    grad, hidden = cast_all(chosen.dtype, grad.contiguous(), hidden)
    found = chosen.engine.backward(grad, operands.cast(chosen.dtype), hidden, needs)
    x, a, b, weights = (cast(v, d) if n else None for v, d, n in zip(found, own, needs, strict=True))
    return x, a, b, weights


@backward_op.register_fake
def _(grad, x, a, b, weights, indices, hidden, base, engine, needs):
    shapes = (
        grad.new_empty(grad.shape[0], a.shape[-1]),
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        weights.new_empty(weights.shape),
    )
    return [shape for shape, need in zip(shapes, needs, strict=True) if need]


def check_indices(x: Tensor, a: Tensor, indices: Tensor | None) -> None:
    """Raise ShapeError where an index (T, K) names none of the experts of a (E, r, i), where checking needs no sync."""
    if indices is not None and (x.device.type == "cpu" or DEBUG):
        check_range(indices, a.shape[0])


def check_range(indices: Tensor, n_experts: int) -> None:
    """Raise ShapeError where an index (T, K) names no expert. On a CPU always; on a GPU it would sync, so on demand."""
    if indices.numel():
        if indices.numel() <= _FEW_INDICES and indices.device.type == "cpu":
            known = indices.flatten().tolist()
            low, high = min(known), max(known)
        else:
            low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= n_experts:
            raise ShapeError(f"indices lie between {low} and {high}; there are experts 0 … {n_experts - 1}.")


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, weights, indices, base, _, engine = inputs
    need_x, need_a, need_b, need_weights = ctx.needs_input_grad[:4]
    # x is kept only for the gradient of a; hidden for those of b and the weights.
    kept_x = x if need_a else None
    hidden = output[1] if need_b or need_weights else None
    ctx.save_for_backward(kept_x, a, b, weights, indices, hidden, base if need_x else None)
    ctx.engine = engine
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    needs = list(ctx.needs_input_grad[:4])
    if grad is None or not any(needs):
        return (None,) * 8
    x, a, b, weights, indices, hidden, base = ctx.saved_tensors
    found = iter(backward_op(grad, x, a, b, weights, indices, hidden, base, ctx.engine, needs))
    return (*(next(found) if need else None for need in needs), None, None, None, None)


forward_op.register_autograd(_backward, setup_context=_save)
