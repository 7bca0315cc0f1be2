"""A linear gate, its mixture and the frozen linear as one node of the autograd graph.

Apart, they are a dozen nodes, whose bookkeeping costs as much as the products of a short training step, and the gate's
gradient of x is a tensor of its own that autograd has to add. Here it accumulates onto the mixture's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..compat import is_autocast, own_view
from . import ops
from .dispatch import choose
from .dtypes import cast, cast_all, exact_dtypes, wide
from .engine import Operands
from .gate import Gate

_FEW_ROWS = 64


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Gate,
    a: Tensor,
    b: Tensor,
    scaling: float = 1.0,
    *,
    engine: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return a frozen linear plus the experts that a linear gate chooses and weighs.

    y[t] = x[t] Wᵀ + bias + s · Σ_j w[t, j] · (x[t] a[e]ᵀ) b[e], e = indices[t, j]: what `mixture_linear` gives with
    that routing, in value and gradients. For eager code: where a graph is traced, compose the two.

    Args:
        x: (*rows, i), in the compute dtype: autocast is not looked at.
        weight: (o, i) frozen, no gradient is formed.
        bias: (o,) frozen, or None.
        gate: how the routing is formed.
        a: (E, r, i) down factors.
        b: (E, r, o) up factors, stored transposed.
        scaling: s.
        engine: a name of `engines()`; None lets `choose_engine` decide.

    Returns:
        y (*rows, o); weights (*rows, K), indices (*rows, K) or None for all experts, and logits (*rows, E) in fp32 or
        wider of the routing. All but the indices carry gradients.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5, over `low_rank_mixture`.
    """
    if is_autocast():
        with exact_dtypes(x):
            return gated_linear(x, weight, bias, gate, a, b, scaling, engine=engine)
    name = engine or ""
    chosen = choose(name, x.shape[:-1].numel(), a.shape, b.shape[2], gate.k, x.dtype, x.device, "few_rows")
    if not chosen.few and torch.is_grad_enabled():
        return _GatedLinear.apply(x, gate.weight, a, b, (weight, bias, gate, scaling, name))  # type: ignore[no-any-return]
    # No node is needed: in decoding and short steps its bookkeeping is what costs.
    logits = _logits(_jittered(x, gate)[0] if gate.jitter else x, gate.weight)
    weights, indices, _ = gate.decide(logits)
    operands = Operands(x, a, b, weights, indices, weight, bias)
    y = (
        chosen.engine.few_rows(operands, scaling, chosen.dtype)
        if chosen.few
        else ops.compose(operands, chosen, scaling)
    )
    return y, weights, indices, logits


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        a: Tensor,
        b: Tensor,
        call: tuple[Tensor, Tensor | None, Gate, float, str],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        base, bias, gate, scaling, engine = call  # what has no gradient
        rows = _flat(x)
        chosen = ops.choose_for(rows, a, b, gate.k, engine, "routed")
        noise, found = None, None
        if "routed" in chosen.abilities and gate.is_softmax_top_k and not gate.jitter:
            down, up, weight, shift = cast_all(rows.dtype, a, b, base, bias)
            found = chosen.engine.routed(rows, gate_weight, down, up, gate.k, scaling, weight, shift)
        if found is None:
            seen, noise = _jittered(rows, gate)
            logits = _logits(seen, gate_weight)
            weights, indices, scores = gate.decide(logits)
            operands = Operands(rows, a, b, weights, indices, base, bias)
            y, hidden = ops.run_forward(ops.scaled(operands, scaling), chosen)
        else:
            y, logits, weights, indices, hidden = found
            scores = None
        needs = ctx.needs_input_grad[:4]
        # As in the op: x is for the gradients of a and the gate, the base for that of x.
        own_x = rows if needs[1] or needs[2] else None
        ctx.save_for_backward(
            own_x, noise, gate_weight, a, b, weights, indices, scores, hidden, base if needs[0] else None
        )
        ctx.call = x.shape, gate, scaling, chosen
        if indices is not None:
            ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return _unflatten(x, y, weights, indices, logits)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad: Tensor | None,
        grad_weights: Tensor | None,
        _: None,
        grad_logits: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        rows, noise, gate_weight, a, b, weights, indices, scores, hidden, base = ctx.saved_tensors
        shape, gate, scaling, chosen = ctx.call
        need_x, need_gate, need_a, need_b = ctx.needs_input_grad[:4]
        to_x = to_gate = to_a = to_b = None
        to_weights = None if grad_weights is None else _flat(grad_weights)
        if grad is not None:
            operands, needs = Operands(rows, a, b, weights, indices, base), (need_x, need_a, need_b, True)
            inner = ops.scaled(operands, scaling)
            to_x, to_a, to_b, own = ops.run_backward(_flat(grad), inner, hidden, needs, chosen)
            assert own is not None
            own = own if scaling == 1 else own * scaling
            to_weights = own if to_weights is None else own + to_weights
        to_logits = gate.to_logits(
            None if grad_logits is None else _flat(grad_logits),
            to_weights,
            weights,
            indices,
            scores,
        )
        if to_logits is not None:
            if need_gate:
                seen = rows if noise is None else rows * noise
                to_gate = cast(to_logits.T @ cast(seen, to_logits.dtype), gate_weight.dtype)
            if need_x:
                to_x = _plus_product(to_x, to_logits, gate_weight, noise)
        if to_x is not None:
            to_x = to_x.view(shape)
        return to_x, to_gate, to_a, to_b, None


def _jittered(rows: Tensor, gate: Gate) -> tuple[Tensor, Tensor | None]:
    """Return what the gate sees of rows (*rows, i), and the noise that it is multiplied by, or None."""
    if not gate.jitter:
        return rows, None
    noise = torch.empty_like(rows).uniform_(1 - gate.jitter, 1 + gate.jitter)
    return rows * noise, noise


def _logits(rows: Tensor, gate: Tensor) -> Tensor:
    """Return the logits (*rows, E) of rows (*rows, i): near-ties must not flip with the activation dtype."""
    if rows.dtype != gate.dtype or rows.itemsize < 4:
        dtype = wide(rows.dtype)
        rows, gate = cast(rows, dtype), cast(gate, dtype)
    # For many rows a CPU takes two thirds of the time in this order.
    return F.linear(rows, gate) if rows.ndim != 2 or len(rows) <= _FEW_ROWS else (gate @ rows.T).T


def _flat(values: Tensor) -> Tensor:
    """Return values (*rows, f) as (T, f)."""
    return values if values.ndim == 2 else values.reshape(-1, values.shape[-1])


def _unflatten(
    x: Tensor, y: Tensor, weights: Tensor, indices: Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return the values (T, f) with the leading axes of x (*rows, i)."""
    if x.ndim == 2:
        return y, weights, indices, logits
    rows = x.shape[:-1]
    shape = (*rows, weights.shape[1])
    slots = None if indices is None else indices.view(shape)
    return own_view(y, (*rows, y.shape[1])), weights.view(shape), slots, logits.view(*rows, logits.shape[1])


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, noise: Tensor | None) -> Tensor:
    """Return total + left right (· noise), in place and in one pass where they share a dtype; fresh for None."""
    right = cast(right, left.dtype)
    if noise is not None:
        product = left @ right * noise
    elif total is None or total.dtype != left.dtype:
        product = left @ right
    else:
        return total.addmm_(left, right)
    return product if total is None else total.add_(cast(product, total.dtype))
