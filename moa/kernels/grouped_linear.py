"""The grouped linear: each slot of a row multiplied by its own expert's matrix. A mixture is two of them and a sum.

`low_rank_mixture` runs the same products with less traffic where they are thin; this op is for experts that do
something between them, and for your own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError, ShapeError, unknown_name
from . import sorted_rows
from .dispatch import is_emulated, why_not
from .ops import check_indices, exact_dtypes

_ENGINES = ("sorted", "triton_grouped")


def grouped_linear(x: Tensor, weight: Tensor, indices: Tensor, *, engine: str | None = None) -> Tensor:
    """Return each slot's product with its own matrix, y[t, j] = x[t] weight[e]ᵀ with e = indices[t, j].

    Args:
        x: (*rows, i) inputs, any strides; (0, i) is allowed.
        weight: (E, p, i); may be an fp32 master of a lower-precision x.
        indices: (*rows, K) int64 expert of each slot, in any order and number.
        engine: "sorted" (plain products over rows sorted by expert; reads its group sizes on the host), or
            "triton_grouped" (no host sync; p of any size, best when thin); None takes Triton's on a GPU that has it.

    Returns:
        (*rows, K, p), new, in x's dtype, or in the autocast dtype where autocast is on. Gradients of x and weight come
        in each one's own dtype; a product nobody asked for is not computed.

    Raises:
        ShapeError: shapes, dtypes or devices that do not belong together; an index that names no expert (on a CPU
            always, on a GPU with MOA_DEBUG=1).
        BackendError: the engine is not known or cannot run here.

    Source: Shazeer et al. 2017, arXiv 1701.06538, §2 (the experts of a row, without their sum).
    """
    _check(x, weight, indices)
    if engine is not None and engine not in _ENGINES:
        raise BackendError(unknown_name("engine", engine, _ENGINES, "moa.kernels.grouped_linear"))
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    y = grouped_linear_op(flat, weight, indices.reshape(-1, indices.shape[-1]), engine or "")
    return y.view(*indices.shape, weight.shape[1])


@torch.library.custom_op("moa::grouped_linear", mutates_args=())
def grouped_linear_op(x: Tensor, weight: Tensor, indices: Tensor, engine: str) -> Tensor:
    check_indices(x, weight, indices)
    with exact_dtypes(x):
        if _engine(engine, x) == "triton_grouped" and x.shape[0]:
            from . import triton_slots

            return triton_slots.slot_products(x, weight.to(x.dtype), indices)
        wide = torch.float32 if is_emulated(x) else x.dtype
        return sorted_rows.slot_products(x.to(wide), weight.to(wide), indices).to(x.dtype)


@grouped_linear_op.register_fake
def _(x, weight, indices, engine):
    return x.new_empty(*indices.shape, weight.shape[1])


@torch.library.custom_op("moa::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(
    grad: Tensor, x: Tensor | None, weight: Tensor, indices: Tensor, engine: str, needs: list[bool]
) -> list[Tensor]:
    with exact_dtypes(grad):
        if _engine(engine, grad) == "triton_grouped" and grad.shape[0]:
            from . import triton_slots

            used: Any = triton_slots
            wide = grad.dtype
        else:
            used, wide = sorted_rows, torch.float32 if is_emulated(grad) else grad.dtype
        rows = None if x is None else x.to(wide)
        found = used.slot_gradients(grad.to(wide).contiguous(), rows, weight.to(wide), indices, needs)
    kept = [dtype for dtype, need in zip((grad.dtype, weight.dtype), needs, strict=True) if need]
    return [value.to(dtype) for value, dtype in zip(found, kept, strict=True)]


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


def _engine(name: str, x: Tensor) -> str:
    """Return the engine that was named, or the one for the device and dtype of x (T, i)."""
    if name == "triton_grouped":
        reason = why_not(name)
        if reason is not None:
            raise BackendError(f"engine {name!r} cannot run here: {reason}")
    if name:
        return name
    fits = x.is_cuda and x.dtype != torch.float64 and why_not("triton_grouped") is None
    return "triton_grouped" if fits else "sorted"


def _check(x: Tensor, weight: Tensor, indices: Tensor) -> None:
    """Raise ShapeError where the operands do not belong together."""
    if weight.ndim != 3 or x.ndim < 1 or x.shape[-1] != weight.shape[-1] or indices.shape[:-1] != x.shape[:-1]:
        raise ShapeError(
            f"grouped_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)}, indices {tuple(indices.shape)} do not "
            "fit: expected x (*rows, i), weight (E, p, i) and indices (*rows, K) with the same rows and i."
        )
    if not (x.is_floating_point() and weight.is_floating_point()) or indices.dtype != torch.int64:
        raise ShapeError(
            f"grouped_linear: x is {x.dtype}, weight {weight.dtype} and indices {indices.dtype}; expected floating x "
            "and weight, and int64 indices."
        )
    for name, value in (("weight", weight), ("indices", indices)):
        if value.device != x.device:
            raise ShapeError(f"grouped_linear: x is on {x.device} but {name} on {value.device}; move one of them.")
