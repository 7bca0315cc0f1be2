"""A mixture of weight changes that have no low rank: rows go to the experts that they chose, and to no others.

Nothing of an expert's size is kept for the backward pass: a change is formed again there, from its expert's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dtypes import cast, exact_dtypes
from .plan import sort_slots

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Changes:
    """How experts become weight changes.

    Args:
        n_experts: E.
        d_out: o.
        form: one expert's tensors -> its change ΔW (o, i).
        apply: rows (*rows, i) and one expert's tensors -> ΔW x (*rows, o), without ΔW; or None.
        few: up to so many rows of an expert, `apply` costs less than ΔW.
        own: name -> tensor (E, …), one slice for each expert.
        shared: name -> tensor of any shape that all experts read, where it is trained.
    """

    n_experts: int
    d_out: int
    form: Callable[[Tensors], Tensor]
    apply: Callable[[Tensor, Tensors], Tensor] | None
    own: Tensors
    shared: Tensors
    few: float = math.inf

    def applies(self, n_rows: int) -> bool:
        """Return whether an expert that n rows chose, (n, i), forms no ΔW."""
        return self.apply is not None and n_rows <= self.few

    def of(self, expert: int) -> dict[str, Tensor]:
        """Return one expert's tensors, of any shape."""
        return {**{name: tensor[expert] for name, tensor in self.own.items()}, **self.shared}


def change_mixture(
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    changes: Changes,
    base: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return Σ_k w_k ΔW_{e_k} x, on top of x W^T + b where there is a base, (*rows, o); differentiable once.

    Rows that share a routing stay together: one that is the same on all rows is one product with one weight.

    Args:
        x: (*rows, i).
        weights: (*wrows, K), whose rows broadcast against x's; a weight of 0 without indices chooses nothing.
        indices: (*wrows, K) int64, distinct in a row; None means all experts, K = E.
        changes: the experts.
        base: W (o, i) frozen, or None.
        bias: b (o,) frozen, or None.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    rows, units = x.shape[:-1], routed_units(x, weights)
    split = cast(x, dtype).reshape(units.numel(), rows[len(units) :].numel(), x.shape[-1])  # (N, L, i)
    spread = [None if t is None else spread_over(t, units, len(rows)) for t in (weights, indices)]
    tensors = (*changes.own.values(), *changes.shared.values())
    y: Tensor = _Mixed.apply(split, *spread, base, bias, changes, *tensors)
    return y.reshape(*rows, changes.d_out)


def routed_units(x: Tensor, weights: Tensor) -> torch.Size:
    """Return the leading rows of x (*rows, i) over which a routing (*wrows, K) changes: behind them it is constant."""
    rows = x.shape[:-1]
    routed = (1,) * (len(rows) - weights.ndim + 1) + tuple(weights.shape[:-1])
    cut = len(rows)
    while cut and routed[cut - 1] == 1:
        cut -= 1
    return rows[:cut]


def spread_over(value: Tensor, units: torch.Size, n_axes: int) -> Tensor:
    """Return weights or indices (*wrows, K) for each unit, (N, K).

    Args:
        value: of a routing.
        units: the leading rows over which it changes; N is their number.
        n_axes: of x's rows.
    """
    missing = n_axes - value.ndim + 1
    full = value.reshape(*(1,) * missing, *value.shape)
    head = full.reshape(*full.shape[: len(units)], full.shape[-1])  # the axes behind the units have one place each
    return head.expand(*units, head.shape[-1]).reshape(units.numel(), head.shape[-1])


class _Group(NamedTuple):
    """An expert, the units that chose it (None: all), and their places among the flat weights (N · K,)."""

    expert: int
    units: Tensor | None
    places: Tensor


def _groups(weights: Tensor, indices: Tensor | None, n_experts: int) -> list[_Group]:
    """Return which units chose which expert, of weights and indices (N, K)."""
    n, k = weights.shape
    if indices is None:
        at = (weights != 0).mT.nonzero()  # (n chosen, 2): expert and unit, experts ascending
        places, units = at[:, 1] * k + at[:, 0], at[:, 1]
        ends = torch.searchsorted(at[:, 0].contiguous(), torch.arange(n_experts + 1, device=at.device)).tolist()
    else:
        plan = sort_slots(indices, n_experts)
        places, units, ends = plan.order, plan.rows, plan.offsets.tolist()
    chosen = [(e, slice(ends[e], ends[e + 1])) for e in range(n_experts) if ends[e] < ends[e + 1]]
    return [_Group(e, None if at.stop - at.start == n else units[at], places[at]) for e, at in chosen]


def _take(values: Tensor, units: Tensor | None) -> Tensor:
    return values if units is None else values.index_select(0, units)


def _add(onto: Tensor, units: Tensor | None, values: Tensor) -> None:
    if units is None:
        onto += values
    else:
        onto.index_add_(0, units, values)


class _Mixed(torch.autograd.Function):
    """`change_mixture` of units x (N, L, i) with weights and indices (N, K), each unit's rows on one routing."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        indices: Tensor | None,
        base: Tensor | None,
        bias: Tensor | None,
        changes: Changes,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, weights, indices, base, *tensors)
        ctx.changes = changes
        with exact_dtypes(x):
            groups = _groups(weights, indices, changes.n_experts)
            if len(x) == 1 and not changes.applies(x.shape[1]):
                return _one_weight(x, weights, groups, changes, base, bias)
            n_rows = x.shape[:2]
            y = x.new_zeros(*n_rows, changes.d_out) if base is None else F.linear(x, base.to(x.dtype), _as(bias, x))
            flat = weights.flatten()
            for group in groups:
                given, own = _take(x, group.units), changes.of(group.expert)
                if changes.apply is not None and changes.applies(given.shape[:2].numel()):
                    out = changes.apply(given, own)
                else:
                    out = F.linear(given, changes.form(own).to(x.dtype))
                _add(y, group.units, (out * flat[group.places].view(-1, 1, 1).to(out.dtype)).to(y.dtype))
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, indices, base, *tensors = ctx.saved_tensors
        changes: Changes = ctx.changes
        needs = ctx.needs_input_grad
        with exact_dtypes(x):
            back = _Backward(changes, tensors, needs[6:])
            to_weights = weights.new_zeros(weights.numel()) if needs[1] else None
            if len(x) == 1 and not changes.applies(x.shape[1]):
                to_x = back.through_one_weight(x, weights, indices, base, grad, needs[0], to_weights)
            else:
                to_x = back.through_rows(x, weights, indices, base, grad, needs[0], to_weights)
        if to_weights is not None:
            to_weights = to_weights.view_as(weights)
        return to_x, to_weights, None, None, None, None, *back.gradients


def _plus(total: Tensor | None, change: Tensor) -> Tensor:
    return change if total is None else total.add_(change)


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _one_weight(
    x: Tensor, weights: Tensor, groups: list[_Group], changes: Changes, base: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return the mixture of x (1, L, i) as one product with one weight, which holds the base where nothing is lost."""
    flat, total = weights.flatten(), None
    for group in groups:
        total = _plus(total, changes.form(changes.of(group.expert)) * flat[group.places])
    if total is None:
        return x.new_zeros(*x.shape[:2], changes.d_out) if base is None else F.linear(x, base.to(x.dtype), _as(bias, x))
    if base is not None and base.dtype == total.dtype == x.dtype:  # a half-precision base would round the change away
        return F.linear(x, total.add_(base), bias)
    y = F.linear(x, total.to(x.dtype))
    return y if base is None else y.add_(F.linear(x, base.to(x.dtype), _as(bias, x)))


class _Backward:
    """Forms each expert's change again, with a graph of its own, and collects the gradients of its tensors.

    Args:
        changes: the experts.
        tensors: the values of `changes.own` and `changes.shared`, as they were in the forward pass.
        needs: which of them want a gradient.
    """

    def __init__(self, changes: Changes, tensors: list[Tensor], needs: tuple[bool, ...]) -> None:
        self.changes = changes
        self.names = [*changes.own, *changes.shared]
        self.tensors = dict(zip(self.names, tensors, strict=True))
        self.wanted = [name for name, need in zip(self.names, needs, strict=True) if need]
        self.found = {name: torch.zeros_like(self.tensors[name]) for name in self.wanted}

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradients, in the order of the tensors."""
        return [self.found.get(name) for name in self.names]

    def _leaves(self, expert: int) -> dict[str, Tensor]:
        own = self.changes.own
        slices = {name: (t[expert] if name in own else t).detach() for name, t in self.tensors.items()}
        return {name: t.requires_grad_(name in self.wanted) for name, t in slices.items()}

    def _collect(self, expert: int, output: Tensor, above: Tensor, leaves: dict[str, Tensor], *more: Tensor) -> Any:
        """Add the gradients of one expert's tensors, and return those of more."""
        inputs = [*(leaves[name] for name in self.wanted), *more]
        if not inputs or not output.requires_grad:
            return [torch.zeros_like(t) for t in more]
        grads = torch.autograd.grad(output, inputs, above.to(output.dtype), allow_unused=True)
        for name, grad in zip(self.wanted, grads, strict=False):
            if grad is not None:
                found = self.found[name]
                (found[expert] if name in self.changes.own else found).add_(grad)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(more, grads[len(self.wanted) :], strict=True)]

    def through_one_weight(
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor | None,
        base: Tensor | None,
        grad: Tensor,
        need_x: bool,
        to_weights: Tensor | None,
    ) -> Tensor | None:
        """Return the gradient of x (1, L, i) whose rows have one routing (1, K); fill in that of the weights (K,)."""
        outer = grad.flatten(0, 1).mT @ x.flatten(0, 1)  # (o, i)
        total = None
        for group in _groups(weights, indices, self.changes.n_experts):
            leaves = self._leaves(group.expert)
            with torch.enable_grad():
                change = self.changes.form(leaves)  # (o, i)
            scale = weights.flatten()[group.places]
            if to_weights is not None:
                to_weights[group.places] = (outer.to(change.dtype) * change.detach()).sum().to(to_weights.dtype)
            self._collect(group.expert, change, outer * scale.to(outer.dtype), leaves)
            if need_x:
                total = _plus(total, change.detach() * scale)
        if not need_x:
            return None
        if total is None:
            return torch.zeros_like(x) if base is None else grad @ base.to(grad.dtype)
        if base is not None and base.dtype == total.dtype == grad.dtype:
            return grad @ total.add_(base)
        to_x = grad @ total.to(grad.dtype)
        return to_x if base is None else to_x.add_(grad @ base.to(grad.dtype))

    def through_rows(
        self,
        x: Tensor,
        weights: Tensor,
        indices: Tensor | None,
        base: Tensor | None,
        grad: Tensor,
        need_x: bool,
        to_weights: Tensor | None,
    ) -> Tensor | None:
        """Return the gradient of x (N, L, i) with weights and indices (N, K); fill in that of the weights (N · K,)."""
        to_x = None
        if need_x:
            to_x = torch.zeros_like(x) if base is None else grad @ base.to(grad.dtype)
        for group in _groups(weights, indices, self.changes.n_experts):
            scale = weights.flatten()[group.places].view(-1, 1, 1).to(grad.dtype)  # (n, 1, 1)
            given, above = _take(x, group.units), _take(grad, group.units)
            applies = self.changes.applies(given.shape[:2].numel())
            through = self._through_apply if applies else self._through_change
            back, to_scale = through(group.expert, given, above, scale)  # (n, L, i), (n,)
            if to_x is not None:
                _add(to_x, group.units, back)
            if to_weights is not None:
                to_weights[group.places] = to_scale.to(to_weights.dtype)
        return to_x

    def _through_change(self, expert: int, given: Tensor, above: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        leaves = self._leaves(expert)
        with torch.enable_grad():
            change = self.changes.form(leaves)
        back = above @ change.detach().to(above.dtype)  # of the rows, before their weight
        if self.wanted:
            outer = (above * scale).flatten(0, 1).mT @ given.flatten(0, 1)  # (o, i)
            self._collect(expert, change, outer, leaves)
        return back * scale, (back * given).sum((1, 2))

    def _through_apply(self, expert: int, given: Tensor, above: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        assert self.changes.apply is not None
        leaves = self._leaves(expert)
        with torch.enable_grad():
            rows = given.detach().requires_grad_()
            out = self.changes.apply(rows, leaves)  # (n, L, o)
        (back,) = self._collect(expert, out, above * scale, leaves, rows)
        return back, (above * out.detach()).sum((1, 2))
