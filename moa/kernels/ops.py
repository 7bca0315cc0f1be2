"""The op behind `low_rank_mixture` and `mixture_linear`: `torch.library`, with a fake and an autograd rule.

Saved for backward beyond x: the hidden values of the chosen slots (T, K, r), the weights and the indices.
The pair is opaque to `torch.compile`: a graph holds one node forward and one backward.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from . import concat
from .dispatch import PLAIN, choose_engine, get_engine, is_emulated
from .dtypes import cast, cast_all, exact_dtypes

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
        return run_forward(x, a, b, weights, indices, base, bias, *pick(engine, x, a, b, weights.shape[-1]))


def infer(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    engine: str,
    scaling: float = 1.0,
) -> Tensor:
    """Return y of `forward_op` without its bookkeeping: for plain tensors, no gradients and no autocast.

    `scaling` multiplies the mixture. Where rows are few, what costs is the number of calls.
    """
    n_rows, on_cpu = x.shape[0], x.device.type == "cpu"
    if n_rows == 1 and on_cpu and not engine:
        few, emulated = True, is_emulated(x)
    else:
        used, emulated = pick(engine, x, a, b, weights.shape[-1])
        few = on_cpu and used is concat and n_rows <= concat.FEW_ROWS
    if not few:
        check_indices(x, a, indices)
        scaled = weights if scaling == 1 else weights * scaling
        return run_forward(x, a, b, scaled, indices, base, bias, used, emulated)[0]
    try:
        y = concat.infer(x, a, b, weights, indices, torch.float32 if emulated else x.dtype)
    except (IndexError, RuntimeError):  # the ops look at every index anyway: it is named only where one is wrong
        check_indices(x, a, indices)
        raise
    if base is None:
        y = cast(y if scaling == 1 else y * scaling, x.dtype)
        return y if bias is None else y.add_(bias)
    dtype = torch.float32 if emulated and n_rows >= _CAST_PAYS else x.dtype
    base, bias = cast_all(dtype, base, bias)
    return cast(F.linear(cast(x, dtype), base, bias).add_(y, alpha=scaling), x.dtype)


def run_forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    used: ModuleType,
    emulated: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r) of `forward_op` by the engine that `pick` returned."""
    if not emulated:
        return used.forward(x, *cast_all(x.dtype, a, b), weights, indices, *cast_all(x.dtype, base, bias))
    late = base if x.shape[0] < _CAST_PAYS else None
    wide = cast_all(torch.float32, x, a, b)
    early = cast_all(torch.float32, None if late is not None else base, bias)
    y, hidden = cast_all(x.dtype, *used.forward(*wide, weights, indices, *early))
    return (y if late is None else y.add_(F.linear(x, cast(late, x.dtype)))), hidden


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
        used = pick(engine, grad, a, b, weights.shape[-1])
        return run_backward(grad, x, a, b, weights, indices, hidden, base, needs, *used)


def run_backward(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor | None,
    base: Tensor | None,
    needs: list[bool],
    used: ModuleType,
    emulated: bool,
) -> list[Tensor]:
    """Return the gradients of x, a, b, weights that `needs` names by the engine that `pick` returned."""
    grad = grad.contiguous()
    if emulated:
        wide = cast_all(torch.float32, grad, x, a, b)
        found = used.backward(*wide, weights, indices, *cast_all(torch.float32, hidden, base), needs)
    else:
        factors = cast_all(grad.dtype, a, b)
        found = used.backward(grad, x, *factors, weights, indices, hidden, *cast_all(grad.dtype, base), needs)
    dtypes = (grad.dtype, a.dtype, b.dtype, weights.dtype)
    kept = [dtype for dtype, need in zip(dtypes, needs, strict=True) if need]
    return [cast(value, dtype) for value, dtype in zip(found, kept, strict=True)]


@backward_op.register_fake
def _(grad, x, a, b, weights, indices, hidden, base, engine, needs):
    shapes = (
        grad.new_empty(grad.shape[0], a.shape[-1]),
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        weights.new_empty(weights.shape),
    )
    return [shape for shape, need in zip(shapes, needs, strict=True) if need]


def pick(name: str, x: Tensor, a: Tensor, b: Tensor, k: int) -> tuple[ModuleType, bool]:
    """Return the engine that was named, or the one that the sizes choose, and whether it runs in fp32 instead.

    A CPU that multiplies 16-bit dtypes only in software does so 10 to 100 × slower: there such products run in fp32,
    wider and hence at least as accurate, at the price of transient fp32 copies.
    """
    n_experts, rank, d_in = a.shape
    if not name:
        name = choose_engine(x.shape[0], d_in, b.shape[-1], n_experts, rank, k, x.dtype, x.device)
    return get_engine(name), name in PLAIN and is_emulated(x)


def check_indices(x: Tensor, a: Tensor, indices: Tensor | None) -> None:
    """Raise ShapeError where an index (T, K) names none of the experts of a (E, r, i), if that can be told for free."""
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
    # x is kept for the gradient of a alone; hidden for those of b and the weights.
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
