"""The `concat` engine: every expert in one thin product, and a mask on the rank-sized middle.

Experts of rank r are so thin that running all E of them costs less than sorting rows by expert until E·r is
about 50·k (fp32) to 110·k (bf16) on a CPU. Both factors are stored (E, r, d), so concatenations are views.
Contract of an engine: `forward` returns y and the hidden values of the chosen slots; `backward` returns the
gradients that are asked for. Rows are flat here; weights and indices have one row per row of x.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bag

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
    n_experts, rank, _ = a.shape
    full = x @ a.flatten(0, 1).T  # (T, E·r)
    slots = None
    if indices is None:
        hidden = full.view(-1, n_experts, rank)
    else:
        slots = slot_rows(indices, n_experts)
        hidden = full.view(-1, rank).index_select(0, slots).view(*indices.shape, rank)
    mixed = scale(hidden, weights)
    if indices is not None and bag.pays(hidden, n_experts):
        y = bag.expand(mixed, indices, b)
        if bias is not None:
            y += bias
    else:
        up, mixed = b.flatten(0, 1), spread(mixed, slots, n_experts)
        y = mixed @ up if bias is None else torch.addmm(bias, mixed, up)
    return (y if base is None else add_base(y, x, base)), hidden


def infer(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    base: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Return y (T, o) alone, as `forward`, for few rows: there it is the number of calls that costs."""
    if indices is not None:
        weights = weights.new_zeros(x.shape[0], a.shape[0]).scatter_add_(1, indices, weights)
    hidden = F.linear(x, a.flatten(0, 1))
    mixed = scale(hidden.view(-1, *a.shape[:2]), weights).view(hidden.shape)
    up = b.flatten(0, 1)
    if base is not None:
        return F.linear(x, base, bias).addmm_(mixed, up)
    return mixed @ up if bias is None else torch.addmm(bias, mixed, up)


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
    n_experts, rank, _ = a.shape
    need_x, need_a, need_b, need_weights = needs
    slots = None if indices is None else slot_rows(indices, n_experts)
    found: list[Tensor] = []
    grad_weights = None
    if need_x or need_a or need_weights:
        full = grad @ b.flatten(0, 1).T  # (T, E·r)
        if slots is None:
            grad_slots = full.view(-1, n_experts, rank)
        else:
            grad_slots = full.view(-1, rank).index_select(0, slots).view(*weights.shape, rank)
        if need_weights:
            assert hidden is not None
            grad_weights = slot_dot(grad_slots, hidden, weights)
    if need_x or need_a:
        grad_hidden = scale(grad_slots, weights)
        bagged = indices is not None and bag.pays(grad_hidden, n_experts)
        grad_full = spread(grad_hidden, slots, n_experts) if need_a or not bagged else None
        if need_x:
            if bagged:
                assert indices is not None
                grad_x = bag.expand(grad_hidden, indices, a)
            else:
                assert grad_full is not None
                grad_x = grad_full @ a.flatten(0, 1)
            if base is not None:
                grad_x.addmm_(grad, base)
            found.append(grad_x)
        if need_a:
            assert grad_full is not None and x is not None
            found.append((grad_full.T @ x).view_as(a))
    if need_b:
        assert hidden is not None
        mixed = spread(scale(hidden, weights), slots, n_experts)
        found.append((mixed.T @ grad).view_as(b))
    if grad_weights is not None:
        found.append(grad_weights)
    return found


def slot_products(x: Tensor, factors: Tensor, indices: Tensor) -> Tensor:
    """Return x[t] factors[e]ᵀ of each slot, (T, K, p), as `sorted_rows.slot_products`."""
    n_experts, width, _ = factors.shape
    full = x @ factors.flatten(0, 1).T
    return full.view(-1, width).index_select(0, slot_rows(indices, n_experts)).view(*indices.shape, width)


def slot_gradients(grad: Tensor, x: Tensor | None, factors: Tensor, indices: Tensor, needs: list[bool]) -> list[Tensor]:
    """Return the gradients of x and factors that `needs` names, as `sorted_rows.slot_gradients`."""
    n_experts = factors.shape[0]
    bagged = bag.pays(grad, n_experts)
    full = None if bagged and not needs[1] else spread(grad, slot_rows(indices, n_experts), n_experts)
    found: list[Tensor] = []
    if needs[0]:
        found.append(bag.expand(grad, indices, factors) if full is None or bagged else full @ factors.flatten(0, 1))
    if needs[1]:
        assert x is not None and full is not None
        found.append((full.T @ x).view_as(factors))
    return found


def add_base(y: Tensor, x: Tensor, base: Tensor) -> Tensor:
    """Return y (T, o) plus x baseᵀ, in place."""
    if x.shape[0] <= FEW_ROWS:
        return y.add_(F.linear(x, base))
    return y.addmm_(x, base.T)


def slot_rows(indices: Tensor, n_experts: int) -> Tensor:
    """Return where each slot lies (T·K,) in a (T·E)-row view of the full hidden values."""
    first = torch.arange(0, indices.shape[0] * n_experts, n_experts, device=indices.device)
    return (first[:, None] + indices).flatten()


def scale(values: Tensor, weights: Tensor) -> Tensor:
    """Return values (T, K, r) times weights (T, K) in values' dtype; exactly 0 where a weight is 0."""
    gate = weights.unsqueeze(-1)
    # The product is formed in the wider dtype, so that fp32 weights round once.
    scaled = (values * gate).masked_fill_(gate == 0, 0)
    return scaled if scaled.dtype == values.dtype else scaled.to(values.dtype)


def spread(values: Tensor, slots: Tensor | None, n_experts: int) -> Tensor:
    """Return values (T, K, r) laid out over all experts (T, E·r), 0 elsewhere; repeated experts add."""
    rank = values.shape[-1]
    if slots is None:
        return values.reshape(-1, n_experts * rank)
    out = values.new_zeros(values.shape[0] * n_experts, rank)
    out.index_put_((slots,), values.reshape(-1, rank), accumulate=True)
    return out.view(-1, n_experts * rank)


def slot_dot(grad_slots: Tensor, hidden: Tensor, weights: Tensor) -> Tensor:
    """Return ∂/∂weights (T, K): the rank-sized dot product of each slot, summed in fp32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (grad_slots.to(wide) * hidden.to(wide)).sum(-1).to(weights.dtype)
