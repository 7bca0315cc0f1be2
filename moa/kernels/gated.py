"""A softmax top-k gate, its mixture and the frozen linear as one node of the autograd graph.

Apart, they are a dozen nodes, whose bookkeeping costs as much as the products of a short training step, and the gate's
gradient of x is a tensor of its own that autograd has to add. Here it accumulates onto the mixture's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import softmax_backward
from . import ops
from .dispatch import choose
from .dtypes import cast, cast_all, exact_dtypes, wide
from .engine import Operands

_FEW_ROWS = 8


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor,
    a: Tensor,
    b: Tensor,
    k: int,
    scaling: float = 1.0,
    *,
    engine: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a frozen linear plus the experts that a softmax over the k largest logits of x gateᵀ chooses and weighs.

    y[t] = x[t] Wᵀ + bias + s · Σ_j w[t, j] · (x[t] a[e]ᵀ) b[e], e = indices[t, j]: what `mixture_linear` gives with
    that routing, in value and gradients. For eager code: where a graph is traced, compose the two.

    Args:
        x: (*rows, i), in the compute dtype: autocast is not looked at.
        weight: (o, i) frozen, no gradient is formed.
        bias: (o,) frozen, or None.
        gate: (E, i) rows of the router.
        a: (E, r, i) down factors.
        b: (E, r, o) up factors, stored transposed.
        k: experts per row.
        scaling: s.
        engine: a name of `engines()`; None lets `choose_engine` decide.

    Returns:
        y (*rows, o); logits (*rows, E) in fp32 or wider, weights (*rows, K) and indices (*rows, K) of the routing.
        All but the indices carry gradients.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5, over `low_rank_mixture`.
    """
    with exact_dtypes(x):
        if torch.is_grad_enabled():
            found: tuple[Tensor, Tensor, Tensor, Tensor] = _GatedLinear.apply(
                x, gate, a, b, weight, bias, k, scaling, engine
            )
            return found
        # No node is needed, and in decoding its bookkeeping is what costs.
        rows = _flat(x)
        logits, weights, indices = _choose(rows, gate, k)
        y = ops.infer(Operands(rows, a, b, weights, indices, weight, bias), engine or "", scaling)
        return _unflatten(x, y, logits, weights, indices)


def _choose(rows: Tensor, gate: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits (T, E), and weights and indices (T, K) of the k largest, of rows (T, i)."""
    dtype = wide(rows.dtype)  # near-ties must not flip with the activation dtype
    rows, gate = cast(rows, dtype), cast(gate, dtype)
    # For many rows a CPU takes two thirds of the time in this order.
    logits = F.linear(rows, gate) if len(rows) <= _FEW_ROWS else (gate @ rows.T).T
    kept, indices = logits.topk(k, -1)
    return logits, kept.softmax(-1), indices


def _flat(values: Tensor) -> Tensor:
    """Return values (*rows, f) as (T, f)."""
    return values if values.ndim == 2 else values.reshape(-1, values.shape[-1])


def _unflatten(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the values (T, f) with the leading axes of x (*rows, i)."""
    if x.ndim == 2:
        return values  # type: ignore[return-value]
    rows = x.shape[:-1]
    return tuple(value.view(*rows, value.shape[1]) for value in values)  # type: ignore[return-value]


def _scaled(weights: Tensor, scaling: float) -> Tensor:
    return weights if scaling == 1 else weights * scaling


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        a: Tensor,
        b: Tensor,
        base: Tensor,
        bias: Tensor | None,
        k: int,
        scaling: float,
        engine: str | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = _flat(x)
        chosen = choose(engine or "", rows, a, b.shape[-1], k, "routed")
        found = None
        if "routed" in chosen.abilities:
            down, up, weight, shift = cast_all(rows.dtype, a, b, base, bias)
            found = chosen.engine.routed(rows, gate, down, up, k, scaling, weight, shift)
        if found is None:
            logits, weights, indices = _choose(rows, gate, k)
            operands = Operands(rows, a, b, _scaled(weights, scaling), indices, base, bias)
            y, hidden = ops.run_forward(operands, chosen)
        else:
            y, logits, weights, indices, hidden = found
        needs = ctx.needs_input_grad[:4]
        # As in the op: x is for the gradients of a and the gate, the base for that of x.
        ctx.save_for_backward(
            rows if needs[1] or needs[2] else None, gate, a, b, weights, indices, hidden, base if needs[0] else None
        )
        ctx.shape, ctx.scaling, ctx.chosen = x.shape, scaling, chosen
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return _unflatten(x, y, logits, weights, indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_logits: Tensor | None, grad_weights: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        rows, gate, a, b, weights, indices, hidden, base = ctx.saved_tensors
        need_x, need_gate, need_a, need_b = ctx.needs_input_grad[:4]
        grad_x = grad_a = grad_b = None
        if grad is not None:
            operands = Operands(rows, a, b, _scaled(weights, ctx.scaling), indices, base)
            needs = need_x, need_a, need_b, True
            grad_x, grad_a, grad_b, own = ops.run_backward(_flat(grad), operands, hidden, needs, ctx.chosen)
            assert own is not None
            own = _scaled(own, ctx.scaling)
            grad_weights = own if grad_weights is None else own + _flat(grad_weights)
        grad_gate = None
        if grad_weights is not None or grad_logits is not None:
            to_logits = _to_logits(grad_logits, grad_weights, weights, indices, len(gate))
            if need_gate:
                grad_gate = cast(to_logits.T @ cast(rows, to_logits.dtype), gate.dtype)
            if need_x:
                grad_x = _plus_product(grad_x, to_logits, gate)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_gate, grad_a, grad_b, None, None, None, None, None


def _to_logits(
    grad_logits: Tensor | None, grad_weights: Tensor | None, weights: Tensor, indices: Tensor, n_experts: int
) -> Tensor:
    """Return the whole gradient of the logits (T, E): their own, and through the softmax that of the weights (T, K)."""
    own = weights.new_zeros(len(weights), n_experts) if grad_logits is None else _flat(grad_logits)
    if grad_weights is None:
        return own
    through = softmax_backward(_flat(grad_weights), weights)
    return own.scatter_add(1, indices, through)


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return total + left right, in place and in one pass where they share a dtype; a fresh product for None."""
    right = cast(right, left.dtype)
    if total is None:
        return left @ right
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_((left @ right).to(total.dtype))
