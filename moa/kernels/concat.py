"""The `concat` engine: every expert in one thin product, and a mask on the rank-sized middle.

Experts of rank r are so thin that running all E of them costs less than sorting rows by expert until E·r is
about 50·k (fp32) to 110·k (bf16) on a CPU. Both factors are stored (E, r, d), so concatenations are views.
Contract of an engine: `forward` returns y and the hidden values of the chosen slots; `backward` returns the
gradients that are asked for. Rows are flat here; weights and indices have one row per row of x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bag
from .dtypes import cast, wide

# Up to so many rows a product that accumulates is slower than a product and a sum (measured on a CPU).
FEW_ROWS = 64


def forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (T, o) and hidden (T, K, r): y = Σ_j w_j h_j b[e_j] (+ x baseᵀ + bias), h_j = x a[e_j]ᵀ."""
    full = x @ a.flatten(0, 1).T  # (T, E·r)
    columns = None if indices is None else slot_columns(indices, a)
    hidden = (full if columns is None else full.gather(1, columns)).view(*weights.shape, a.shape[1])
    mixed, up = scale(hidden, weights).flatten(1), b.flatten(0, 1)
    if columns is not None and bag.pays(mixed, full.shape[1]):
        y = bag.expand(mixed, columns, up)
        if bias is not None:
            y += bias
    else:
        mixed = mixed if columns is None else spread(mixed, columns, full.shape[1])
        y = mixed @ up if bias is None else torch.addmm(bias, mixed, up)
    return (y if base is None else add_base(y, x, base)), hidden


def infer(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return Σ_j w_j h_j b[e_j] (T, o) alone, formed in a dtype, by few calls. One row reads no experts but its own.

    Raises:
        IndexError, RuntimeError: an index names no expert.
    """
    if indices is not None:
        if len(x) == 1:
            chosen = indices.view(-1)
            a, b = a.index_select(0, chosen), b.index_select(0, chosen)
        else:
            weights = weights.new_zeros(len(x), a.shape[0]).scatter_add_(1, indices, weights)
    hidden = F.linear(cast(x, dtype), cast(a, dtype).flatten(0, 1))
    scale(hidden.view(len(x), *a.shape[:2]), weights, onto_itself=True)
    return hidden @ cast(b, dtype).flatten(0, 1)


def backward(
    grad: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor | None,
    base: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, a, b, weights that `needs` names, in this order."""
    need_x, need_a, need_b, need_weights = needs
    columns = None if indices is None else slot_columns(indices, a)
    found: list[Tensor] = []
    grad_weights = None
    if need_x or need_a or need_weights:
        full = grad @ b.flatten(0, 1).T  # (T, E·r)
        grad_slots = (full if columns is None else full.gather(1, columns)).view(*weights.shape, a.shape[1])
        if need_weights:
            assert hidden is not None
            grad_weights = slot_dot(grad_slots, hidden, weights)
    if need_x or need_a:
        grads = _gradients(scale(grad_slots, weights), x, a, columns, [need_x, need_a])
        if need_x and base is not None:
            grads[0].addmm_(grad, base)
        found.extend(grads)
    if need_b:
        assert hidden is not None
        found.extend(_gradients(scale(hidden, weights), grad, b, columns, [False, True]))
    if grad_weights is not None:
        found.append(grad_weights)
    return found


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), as `sorted_rows.slot_products`."""
    full = x @ factors.flatten(0, 1).T
    return full.gather(1, slot_columns(indices, factors)).view(*indices.shape, factors.shape[1])


def slot_gradients(grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` names, as `sorted_rows.slot_gradients`."""
    return _gradients(grad, x, factors, slot_columns(indices, factors), needs)


def _gradients(
    grad: Tensor, x: Tensor | None, factors: Tensor, columns: Tensor | None, needs: list[bool]
) -> list[Tensor]:
    """Return the gradients of x (T, d) and factors (E, r, d) that `needs` names, from grad (T, K, r) at the columns."""
    rows, values = factors.flatten(0, 1), grad.flatten(1)
    if columns is not None and not needs[1] and bag.pays(values, len(rows)):
        return [bag.expand(values, columns, rows)]
    full = values if columns is None else spread(values, columns, len(rows))
    found: list[Tensor] = []
    if needs[0]:
        found.append(full @ rows)
    if needs[1]:
        assert x is not None
        found.append((full.T @ x).view_as(factors))
    return found


def add_base(y: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """Return y (T, o) plus x baseᵀ, in place."""
    if x.shape[0] <= FEW_ROWS:
        return y.add_(F.linear(x, base))
    return y.addmm_(x, base.T)


def slot_columns(indices: Tensor, factors: Tensor) -> Tensor:
    """Return where the r values of each slot (T, K) lie among those of all experts: columns (T, K·r) of E·r."""
    n_experts, rank, _ = factors.shape
    columns = torch.arange(n_experts * rank, device=indices.device).view(n_experts, rank)
    return torch.embedding(columns, indices).flatten(1)


def scale(values: Tensor, weights: Tensor, onto_itself: bool = False) -> Tensor:
    """Return values (T, K, r) times weights (T, K) in values' dtype, new or in place; exactly 0 where a weight is 0."""
    gate = weights.unsqueeze(-1)
    # The product is formed in the wider dtype, so that fp32 weights round once.
    scaled = values.mul_(gate) if onto_itself else values * gate
    # 0 · inf is NaN. Masking costs several times the product: a CPU looks first, a GPU would have to wait for it.
    if weights.device.type != "cpu" or _is_suspect(scaled, weights):
        scaled.masked_fill_(gate == 0, 0)
    return cast(scaled, values.dtype)


def _is_suspect(scaled: Tensor, weights: Tensor) -> bool:
    """Return whether a weight of 0 (T, K) may have made a NaN in scaled (T, K, r)."""
    if len(weights) == 1:  # Python has looked before a tensor op starts
        return 0.0 in weights[0].tolist()
    return math.isnan(scaled.sum())


def spread(values: Tensor, columns: Tensor, n_columns: int) -> Tensor:
    """Return values (T, K·r) at their columns of (T, E·r), 0 elsewhere; repeated experts add."""
    return values.new_zeros(len(values), n_columns).scatter_add_(1, columns, values)


def slot_dot(grad_slots: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """Return ∂/∂weights (T, K): the rank-sized dot product of each slot, summed in fp32 or wider."""
    dtype = wide(hidden.dtype)
    return cast((cast(grad_slots, dtype) * cast(hidden, dtype)).sum(-1), weights.dtype)
