"""The op: a mixture of low-rank experts as a `torch.library` custom op with a fake and an autograd formula.

Saved for backward beyond x: the hidden values of the chosen slots (T, K, r), the weights and the indices.
The op pair is opaque to `torch.compile`, so a graph holds one node forward and one backward.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ShapeError
from .dispatch import choose_engine, get_engine


def low_rank_mixture(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    *,
    engine: str | None = None,
) -> Tensor:
    """Return the weighted sum of the chosen low-rank experts.

    y[t] = Σ_j weights[t, j] · (x[t] a[e]ᵀ) b[e] with e = indices[t, j].

    Args:
        x: (*rows, i) inputs, any strides; (0, i) is allowed.
        a: (E, r, i) down factors; may be fp32 masters of a lower-precision x.
        b: (E, r, o) up factors, stored transposed. Smaller ranks are padded with zero rows in a and b.
        weights: (*wrows, K) floating; wrows broadcasts against rows: (B, S), (B, 1) or (). Per-expert scales
            belong in here. A weight of exactly 0 means that the expert is not active on that row.
        indices: (*wrows, K) int64 expert of each slot; None means all of them, K = E. A repeated expert adds.
        engine: a name of `engines()`; None lets `choose_engine` decide.

    Returns:
        (*rows, o), new, in x's dtype, or in the autocast dtype where autocast is on. Gradients of x, a, b and
        weights come in each one's own dtype; products nobody asked for are not computed.

    Raises:
        ShapeError: shapes, dtypes or devices that do not belong together.
        BackendError: `engine` is not known or cannot run here.

    Source: Hu et al. 2021, arXiv 2106.09685, §4.1, summed over experts as in Shazeer et al. 2017, arXiv
        1701.06538, eq. 1.

    Differs: a hidden value that overflows in an expert of weight 0 never reaches y or a gradient; but where
        an expert's *parameters* are not finite, the engines that run every expert spread them to all rows.
    """
    return _apply(x, a, b, weights, indices, None, None, engine)


def mixture_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    *,
    engine: str | None = None,
) -> Tensor:
    """Return a frozen linear plus the weighted sum of the chosen low-rank experts, adapters first.

    y[t] = x[t] Wᵀ + bias + Σ_j weights[t, j] · (x[t] a[e]ᵀ) b[e] with e = indices[t, j].

    The base product accumulates onto the adapters' (one write instead of a read-modify-write, and more
    accurate than the other order); its input gradient accumulates the same way. Where the base weight or bias
    needs a gradient, the sum is formed from two separate ops instead, with the same value.

    Args:
        x: (*rows, i) inputs.
        weight: (o, i) frozen base weight.
        bias: (o,) frozen base bias, or None.
        a: (E, r, i) down factors.
        b: (E, r, o) up factors, stored transposed.
        weights: (*wrows, K) floating; wrows broadcasts against rows.
        indices: (*wrows, K) int64, or None for all experts, K = E.
        engine: a name of `engines()`; None lets `choose_engine` decide.

    Returns:
        (*rows, o), new, in x's dtype, or in the autocast dtype where autocast is on.

    Raises:
        ShapeError: shapes, dtypes or devices that do not belong together.
        BackendError: `engine` is not known or cannot run here.

    Source: as `low_rank_mixture`; base as in `torch.nn.functional.linear`.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained and torch.is_grad_enabled():
        return F.linear(x, weight, bias) + low_rank_mixture(x, a, b, weights, indices, engine=engine)
    if weight.shape != (b.shape[-1], x.shape[-1]) or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = [None if t is None else tuple(t.shape) for t in (weight, bias, x, b)]
        raise ShapeError(
            "mixture_linear: weight {}, bias {}, x {} and b {} do not fit: weight is (o, i), bias (o,), "
            "x (*rows, i), b (E, r, o).".format(*shapes)
        )
    return _apply(x, a, b, weights, indices, weight, bias, engine)


def _apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    engine: str | None,
) -> Tensor:
    """Check, flatten the rows, bring everything to the compute dtype, and call the op."""
    _check(x, a, b, weights, indices)
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
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    y, _ = torch.ops.moa.low_rank_mixture(
        x.reshape(-1, x.shape[-1]).to(dtype),
        a.to(dtype),
        b.to(dtype),
        weights.reshape(-1, k),
        None if indices is None else indices.reshape(-1, k),
        None if base is None else base.to(dtype),
        None if bias is None else bias.to(dtype),
        engine or "",
    )
    return y.view(*rows, y.shape[-1])


def _check(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor | None) -> None:
    """Raise ShapeError where the operands of one mixture do not belong together."""
    if a.ndim != 3 or b.ndim != 3 or a.shape[:2] != b.shape[:2] or x.ndim < 1 or x.shape[-1] != a.shape[-1]:
        raise ShapeError(
            f"low_rank_mixture: x {tuple(x.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)} do not fit: "
            "expected x (*rows, i), a (E, r, i), b (E, r, o) with the same E, r and i."
        )
    if not (x.is_floating_point() and weights.is_floating_point()):
        raise ShapeError(
            f"low_rank_mixture: x is {x.dtype} and weights {weights.dtype}; both must be floating."
        )
    if indices is None:
        if weights.ndim < 1 or weights.shape[-1] != a.shape[0]:
            raise ShapeError(
                f"low_rank_mixture: weights {tuple(weights.shape)} without indices must hold one weight for "
                f"each of the {a.shape[0]} experts; pass indices to choose some of them."
            )
    elif indices.dtype != torch.int64 or indices.shape != weights.shape:
        raise ShapeError(
            f"low_rank_mixture: indices {indices.dtype} {tuple(indices.shape)} must be int64 and have the "
            f"shape of weights {tuple(weights.shape)}."
        )
    for name, value in (("a", a), ("b", b), ("weights", weights), ("indices", indices)):
        if value is not None and value.device != x.device:
            raise ShapeError(
                f"low_rank_mixture: x is on {x.device} but {name} on {value.device}; move one of them."
            )


@torch.library.custom_op("moa::low_rank_mixture", mutates_args=())
def _forward_op(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
    engine: str,
) -> tuple[Tensor, Tensor]:
    return _engine(engine, x, a, b, weights).forward(x, a, b, weights, indices, base, bias)


@_forward_op.register_fake
def _(x, a, b, weights, indices, base, bias, engine):
    hidden = x.new_empty(x.shape[0], weights.shape[-1], a.shape[1])
    return x.new_empty(x.shape[0], b.shape[-1]), hidden


@torch.library.custom_op("moa::low_rank_mixture_backward", mutates_args=())
def _backward_op(
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
    used = _engine(engine, grad, a, b, weights)
    return used.backward(grad.contiguous(), x, a, b, weights, indices, hidden, base, needs)


@_backward_op.register_fake
def _(grad, x, a, b, weights, indices, hidden, base, engine, needs):
    shapes = (
        grad.new_empty(grad.shape[0], a.shape[-1]),
        a.new_empty(a.shape),
        b.new_empty(b.shape),
        weights.new_empty(weights.shape),
    )
    return [shape for shape, need in zip(shapes, needs, strict=True) if need]


def _engine(name: str, x: Tensor, a: Tensor, b: Tensor, weights: Tensor) -> ModuleType:
    """Return the engine that was named, or the one that the sizes choose."""
    n_experts, rank, d_in = a.shape
    if not name:
        name = choose_engine(
            x.shape[0], d_in, b.shape[-1], n_experts, rank, weights.shape[-1], x.dtype, x.device
        )
    return get_engine(name)


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
    found = iter(
        torch.ops.moa.low_rank_mixture_backward(
            grad, x, a, b, weights, indices, hidden, base, ctx.engine, needs
        )
    )
    return (*(next(found) if need else None for need in needs), None, None, None, None)


_forward_op.register_autograd(_backward, setup_context=_save)
