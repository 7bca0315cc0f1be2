"""The grouped linear, each slot of a row times its own expert's matrix, and its adjoint, the sum over a row's slots.

A mixture is one of each; `low_rank_mixture` runs the same products with less traffic. These are for experts that do
something between the two, as those of a feed-forward block, and for your own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from .dispatch import Chosen, choose
from .dtypes import cast, cast_all, exact_dtypes
from .ops import check_indices


def grouped_linear(x: Tensor, weight: Tensor, indices: Tensor, *, engine: str | None = None) -> Tensor:
    """Return each slot's product with its own matrix, y[t, j] = x[t] weight[e]ᵀ with e = indices[t, j].

    Args:
        x: (*rows, i) inputs, any strides; (0, i) is allowed.
        weight: (E, p, i); may be an fp32 master of a lower-precision x.
        indices: (*rows, K) int64 expert of each slot, in any order and number.
        engine: one with the ability "slots": "concat" (one product over all experts, best when E·p is small), "sorted"
            (plain products over rows sorted by expert; reads its group sizes on the host), "triton_grouped" (no host
            sync; p of any size, best when thin); None lets the sizes choose, see `choose_engine`.

    Returns:
        (*rows, K, p), new, in x's dtype, or in the autocast dtype where autocast is on. Gradients of x and weight come
        in each one's own dtype; a product nobody asked for is not computed.

    Raises:
        ShapeError: shapes, dtypes or devices that do not belong together; an index that names no expert (on a CPU
            always, on a GPU with MOA_DEBUG=1).
        BackendError: the engine is not known, cannot run here or has no slots.

    Source: Shazeer et al. 2017, arXiv 1701.06538, §2 (the experts of a row, without their sum).
    """
    _check("grouped_linear", x, weight, indices, weight.shape[-1:])
    flat = _rows(x, x.shape[-1:])
    y = grouped_linear_op(flat, weight, indices.reshape(-1, indices.shape[-1]), engine or "")
    return y.view(*indices.shape, weight.shape[1])


def grouped_sum(values: Tensor, weight: Tensor, indices: Tensor, *, engine: str | None = None) -> Tensor:
    """Return the sum over a row's slots, y[t] = Σ_j values[t, j] weight[e] with e = indices[t, j].

    Args:
        values: (*rows, K, p) of each slot.
        weight: (E, p, o); may be an fp32 master of lower-precision values.
        indices: (*rows, K) int64 expert of each slot; a repeated expert adds.
        engine: as for `grouped_linear`.

    Returns:
        (*rows, o), new; dtypes and gradients as `grouped_linear`.

    Raises:
        ShapeError: as `grouped_linear`.
        BackendError: as `grouped_linear`.

    Source: the adjoint of `grouped_linear`: its gradient with respect to x.
    """
    _check("grouped_sum", values, weight, indices, (indices.shape[-1], weight.shape[-2]))
    flat = _rows(values, values.shape[-2:])
    y = grouped_sum_op(flat, weight, indices.reshape(-1, indices.shape[-1]), engine or "")
    return y.view(*indices.shape[:-1], weight.shape[-1])


@torch.library.custom_op("moa::grouped_linear", mutates_args=())
def grouped_linear_op(x: Tensor, weight: Tensor, indices: Tensor, engine: str) -> Tensor:
    """Return each slot's product (T, K, p) of x (T, i): see `grouped_linear`."""
    check_indices(x, weight, indices)
    with exact_dtypes(x):
        chosen = _choose(engine, x, weight, indices)
        return cast(chosen.engine.slot_products(*cast_all(chosen.dtype, x, weight), indices), x.dtype)


@grouped_linear_op.register_fake
def _(x, weight, indices, engine):
    return x.new_empty(*indices.shape, weight.shape[1])


@torch.library.custom_op("moa::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(
    grad: Tensor, x: Tensor | None, weight: Tensor, indices: Tensor, engine: str, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of x (T, i) and weight (E, p, i) that `needs` names, from grad (T, K, p)."""
    with exact_dtypes(grad):
        chosen = _choose(engine, grad, weight, indices)
        operands = cast_all(chosen.dtype, grad.contiguous(), x, weight)
        found = chosen.engine.slot_gradients(*operands, indices, needs)
    kept = [dtype for dtype, need in zip((grad.dtype, weight.dtype), needs, strict=True) if need]
    return [cast(value, dtype) for value, dtype in zip(found, kept, strict=True)]


@grouped_linear_backward_op.register_fake
def _(grad, x, weight, indices, engine, needs):
    shapes = (grad.new_empty(grad.shape[0], weight.shape[-1]), weight.new_empty(weight.shape))
    return [shape for shape, need in zip(shapes, needs, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, indices, engine = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, indices)
    ctx.engine = engine


def _backward(ctx, grad):
    needs = list(ctx.needs_input_grad[:2])
    x, weight, indices = ctx.saved_tensors
    found = iter(grouped_linear_backward_op(grad, x, weight, indices, ctx.engine, needs))
    return (*(next(found) if need else None for need in needs), None, None)


grouped_linear_op.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("moa::grouped_sum", mutates_args=())
def grouped_sum_op(values: Tensor, weight: Tensor, indices: Tensor, engine: str) -> Tensor:
    """Return the sum over slots (T, o) of values (T, K, p): see `grouped_sum`."""
    check_indices(values, weight, indices)
    (total,) = grouped_linear_backward_op(values, None, weight, indices, engine, [True, False])
    return total


@grouped_sum_op.register_fake
def _(values, weight, indices, engine):
    return values.new_empty(values.shape[0], weight.shape[-1])


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, weight, indices, engine = inputs
    ctx.save_for_backward(values if ctx.needs_input_grad[1] else None, weight, indices)
    ctx.engine = engine


def _backward_sum(ctx, grad):
    values, weight, indices = ctx.saved_tensors
    need_values, need_weight = ctx.needs_input_grad[:2]
    to_values = grouped_linear_op(grad.contiguous(), weight, indices, ctx.engine) if need_values else None
    to_weight = None
    if need_weight:
        (to_weight,) = grouped_linear_backward_op(values, grad, weight, indices, ctx.engine, [False, True])
    return to_values, to_weight, None, None


grouped_sum_op.register_autograd(_backward_sum, setup_context=_save_sum)


def _rows(values: Tensor, features: torch.Size) -> Tensor:
    """Return values (*rows, *features) as (T, *features) in the compute dtype."""
    dtype = values.dtype
    if torch.is_autocast_enabled(values.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(values.device.type)
    return values.reshape(-1, *features).to(dtype)


def _choose(name: str, like: Tensor, weight: Tensor, indices: Tensor) -> Chosen:
    """Return the engine with slots that is named, or that the sizes choose, for rows like `like` (T, …)."""
    n_rows, k = like.shape[0], indices.shape[-1]
    return choose(name, n_rows, weight.shape, weight.shape[-1], k, like.dtype, like.device, "slots")


def _check(op: str, values: Tensor, weight: Tensor, indices: Tensor, features: Sequence[int]) -> None:
    """Raise ShapeError where the operands, values (*rows, *features), do not belong together."""
    shape = (*indices.shape[:-1], *features)
    if weight.ndim != 3 or values.ndim < len(features) or values.shape != shape:
        expected = "x (*rows, i)" if len(features) == 1 else "values (*rows, K, p)"
        sizes = "(E, p, i)" if len(features) == 1 else "(E, p, o)"
        raise ShapeError(
            f"{op}: {expected.split()[0]} {tuple(values.shape)}, weight {tuple(weight.shape)}, indices "
            f"{tuple(indices.shape)} do not fit: expected {expected}, weight {sizes} and indices (*rows, K) with the "
            "same rows and sizes."
        )
    if not (values.is_floating_point() and weight.is_floating_point()) or indices.dtype != torch.int64:
        raise ShapeError(
            f"{op}: the values are {values.dtype}, weight {weight.dtype} and indices {indices.dtype}; expected "
            "floating values and weight, and int64 indices."
        )
    for name, value in (("weight", weight), ("indices", indices)):
        if value.device != values.device:
            raise ShapeError(f"{op}: the values are on {values.device} but {name} on {value.device}; move one of them.")
