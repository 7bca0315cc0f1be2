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
from .one_weight import OneWeight
from .units import add, groups_of, routed_units, spread_over, take

Tensors = Mapping[str, Tensor]


class ByHand(NamedTuple):
    """What a change that is linear in its expert's tensors does without a graph and without ΔW.

    Args:
        add: the one weight of all rows, one expert's tensors and a scale (1,): adds scale · ΔW (o, i) to the weight.
        backward: rows (*rows, i), what comes from above (*rows, o), the tensors, and whether the first is wanted ->
            ΔW^T above (*rows, i) or None, and name: gradient of Σ above · ΔW x, of those that are trained.
    """

    add: Callable[[OneWeight, Tensors, Tensor], None]
    backward: Callable[[Tensor, Tensor, Tensors, bool], tuple[Tensor | None, Tensors]]


@dataclass(frozen=True)
class Changes:
    """How experts become weight changes.

    Args:
        n_experts: E.
        d_out: o.
        form: one expert's tensors -> its change ΔW (o, i).
        apply: rows (*rows, i) and one expert's tensors -> ΔW x (*rows, o), without ΔW; or None.
        own: name -> tensor (E, …), one slice for each expert.
        shared: name -> tensor of any shape that all experts read, where it is trained.
        few: up to so many rows of an expert, `apply` costs less than ΔW and a product with it.
        few_alone: likewise where all rows share a routing, so that one product has the base and ΔW; by default `few`.
        by_hand: what needs no graph; None where autograd finds the derivative.
    """

    n_experts: int
    d_out: int
    form: Callable[[Tensors], Tensor]
    apply: Callable[[Tensor, Tensors], Tensor] | None
    own: Tensors
    shared: Tensors
    few: float = math.inf
    few_alone: float | None = None
    by_hand: ByHand | None = None

    def applies(self, n_rows: int) -> bool:
        """Return whether an expert that n rows chose, (n, i), forms no ΔW."""
        return self.apply is not None and n_rows <= self.few

    def is_one_weight(self, x: Tensor) -> bool:
        """Return whether units x (N, L, i) are multiplied once, with the sum of their changes."""
        few = self.few if self.few_alone is None else self.few_alone
        return len(x) == 1 and (self.apply is None or x.shape[1] > few)

    def add_to(self, weight: OneWeight, own: Tensors, scale: Tensor) -> None:
        """Add scale · ΔW (o, i), of one expert's tensors, to the one weight of all rows."""
        if self.by_hand is None:
            weight.add(self.form(own), scale)
        else:
            self.by_hand.add(weight, own, scale)

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
            groups = groups_of(weights, indices, changes.n_experts)
            flat = weights.flatten()
            if changes.is_one_weight(x):
                weight = OneWeight(base, x, changes.d_out)
                for group in groups:
                    changes.add_to(weight, changes.of(group.expert), flat[group.places])
                return weight.product(bias)
            n_rows = x.shape[:2]
            y = x.new_zeros(*n_rows, changes.d_out) if base is None else F.linear(x, base.to(x.dtype), _as(bias, x))
            for group in groups:
                given, own = take(x, group.units), changes.of(group.expert)
                if changes.apply is not None and changes.applies(given.shape[:2].numel()):
                    out = changes.apply(given, own)
                else:
                    out = F.linear(given, changes.form(own).to(x.dtype))
                add(y, group.units, (out * flat[group.places].view(-1, 1, 1).to(out.dtype)).to(y.dtype))
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
            if changes.is_one_weight(x):
                to_x = back.through_one_weight(x, weights, indices, base, grad, needs[0], to_weights)
            else:
                to_x = back.through_rows(x, weights, indices, base, grad, needs[0], to_weights)
        if to_weights is not None:
            to_weights = to_weights.view_as(weights)
        return to_x, to_weights, None, None, None, None, *back.gradients


def _as(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


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

    def _values(self, expert: int) -> dict[str, Tensor]:
        own = self.changes.own
        return {name: (t[expert] if name in own else t).detach() for name, t in self.tensors.items()}

    def _leaves(self, expert: int) -> dict[str, Tensor]:
        return {name: t.requires_grad_(name in self.wanted) for name, t in self._values(expert).items()}

    def _collect(
        self,
        expert: int,
        output: Tensor,
        above: Tensor,
        leaves: dict[str, Tensor],
        *more: Tensor,
        scale: Tensor | None = None,
    ) -> Any:
        """Add the gradients of one expert's tensors, times a scale (1,), and return those of more."""
        inputs = [*(leaves[name] for name in self.wanted), *more]
        if not inputs or not output.requires_grad:
            return [torch.zeros_like(t) for t in more]
        grads = torch.autograd.grad(output, inputs, above.to(output.dtype), allow_unused=True)
        self._store(expert, dict(zip(self.wanted, grads, strict=False)), scale)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(more, grads[len(self.wanted) :], strict=True)]

    def _store(self, expert: int, gradients: Mapping[str, Tensor | None], scale: Tensor | None = None) -> None:
        for name, grad in gradients.items():
            if grad is not None and name in self.found:
                found = self.found[name]
                (found[expert] if name in self.changes.own else found).add_(
                    grad if scale is None else grad * scale.view(())
                )

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
        outer = grad.flatten(0, 1).mT @ x.flatten(0, 1) if self.changes.by_hand is None else None  # (o, i)
        weight = OneWeight(base, x, self.changes.d_out) if need_x else None
        for group in groups_of(weights, indices, self.changes.n_experts):
            scale = weights.flatten()[group.places]
            to_scale: Tensor | None
            if outer is None:
                to_scale = self._alone_by_hand(group.expert, x, grad, scale, weight)
            else:
                to_scale = self._alone(group.expert, outer, scale, weight, to_weights is not None)
            if to_weights is not None and to_scale is not None:
                to_weights[group.places] = to_scale.to(to_weights.dtype)
        return None if weight is None else weight.turned(grad)

    def _alone(
        self, expert: int, outer: Tensor, scale: Tensor, weight: OneWeight | None, scaled: bool
    ) -> Tensor | None:
        leaves = self._leaves(expert)
        with torch.enable_grad():
            change = self.changes.form(leaves)  # (o, i)
        self._collect(expert, change, outer, leaves, scale=scale)  # the tensors are smaller than ΔW
        change = change.detach()
        if weight is not None:
            weight.add(change, scale)
        return (outer.to(change.dtype) * change).sum() if scaled else None

    def _alone_by_hand(self, expert: int, x: Tensor, grad: Tensor, scale: Tensor, weight: OneWeight | None) -> Tensor:
        assert self.changes.by_hand is not None
        own = self._values(expert)
        _, found = self.changes.by_hand.backward(x, grad, own, False)
        self._store(expert, found, scale)
        if weight is not None:
            self.changes.add_to(weight, own, scale)
        name, value = next(iter(found.items()))  # ΔW is linear in each of them
        return (value * own[name]).sum()

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
        for group in groups_of(weights, indices, self.changes.n_experts):
            scale = weights.flatten()[group.places].view(-1, 1, 1).to(grad.dtype)  # (n, 1, 1)
            given, above = take(x, group.units), take(grad, group.units)
            through = self._through_change
            if self.changes.applies(given.shape[:2].numel()):
                through = self._through_apply if self.changes.by_hand is None else self._through_by_hand
            back, to_scale = through(group.expert, given, above, scale)  # (n, L, i), (n,)
            if to_x is not None:
                add(to_x, group.units, back)
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

    def _through_by_hand(self, expert: int, given: Tensor, above: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        assert self.changes.by_hand is not None
        back, found = self.changes.by_hand.backward(given * scale, above, self._values(expert), True)
        assert back is not None
        self._store(expert, found)
        to_scale = (back * given).sum((1, 2))
        return back.mul_(scale), to_scale
