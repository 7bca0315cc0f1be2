"""Experts that are weight changes of some structure without a low rank: mixing, folding, merging come with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..delta import Delta, Dense
from ..kernels import Changes, change_mixture
from ..kernels.low_rank import is_plain
from ..types import Routing
from .bank import ExpertBank
from .fused import Fused

Tensors = Mapping[str, Tensor]
FEW_ROWS = 16  # as many as a step of decoding has


class StructuredBank(ExpertBank):
    """E experts E_e(x) = ΔW_e x; a family writes `change`, from one expert's tensors, and the rest is inherited.

    Rows go to the experts that they chose, so the cost grows with K and not with E; a routing that is the same on all
    rows is mixed in weight space. Nothing is kept for the backward pass beyond x and the routing.

    Attributes:
        few: up to so many rows of an expert, `on_rows` costs less than the change formed, in training, too.
        few_alone: likewise where all rows share a routing, and the base and the change are one weight; None is `few`.
    """

    few: float = 0
    few_alone: float | None = None

    def change(self, tensors: Tensors) -> Tensor:
        """Return ΔW (o, i) of one expert, its scale included.

        Args:
            tensors: that expert's slice of each tensor in `per_expert`, and every other parameter whole; any shape.
        """
        raise NotImplementedError

    def on_rows(self, x: Tensor, tensors: Tensors) -> Tensor:
        """Return ΔW x (*rows, o) of one expert on x (*rows, i)."""
        return F.linear(x, self.change(tensors).to(x.dtype))

    def tensors(self, expert: int) -> Tensors:
        """Return one expert's tensors, of any shape."""
        return self.changes().of(expert)

    def changes(self, x: Tensor | None = None) -> Changes:
        """Return what the kernel needs on x (*rows, i): on few rows without a gradient, `on_rows` costs the least."""
        decodes = x is not None and not torch.is_grad_enabled() and x.shape[:-1].numel() <= FEW_ROWS
        few, alone = self.few, self.few if self.few_alone is None else self.few_alone
        if decodes:
            few, alone = max(few, FEW_ROWS), max(alone, FEW_ROWS)
        known = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        own = {name: known[name] for name in self.per_expert}
        shared = {name: p for name, p in self.named_parameters() if name not in own}
        return Changes(self.n_experts, self.d_out, self.change, self.on_rows if few else None, own, shared, few, alone)

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        """Return ΔW_e x, (*rows, o), of x (*rows, i)."""
        return self.on_rows(x, self.tensors(expert))

    def delta(self, expert: int) -> Delta:
        """Return ΔW_e (o, i) as one tensor."""
        return Dense(self.change({name: t.detach() for name, t in self.tensors(expert).items()}))

    def is_one_weight(self, x: Tensor, routing: Routing) -> bool:
        """Return whether rows x (*rows, i) may be multiplied once, by the base and the changes (o, i) together."""
        return True

    def mix_changes(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e ΔW_e x, (*rows, o), of x (*rows, i); a family may know a better way."""
        return change_mixture(x, routing.weights, routing.indices, self.changes(x))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Return Σ_e w_e ΔW_e x, (*rows, o), of x (*rows, i)."""
        x = F.dropout(x, self.dropout, self.training)
        if not is_plain(x, routing.weights):
            return super().forward(x, routing)
        return self.mix_changes(x, routing)

    @property
    def fused(self) -> FusedChanges:
        """The base in one step with the experts, on rows (*rows, i)."""
        return FusedChanges(self)


def few_for(a_row: int, forming: int, d_in: int, d_out: int) -> tuple[float, float]:
    """Return up to how many rows (n, i) products without ΔW cost less than ΔW (o, i) and products with it.

    A step of training forms ΔW twice, and going back through that costs as much again. It multiplies three times by as
    many numbers as ΔW has, once where the base and ΔW are one weight; without ΔW it multiplies four times by `a_row`.

    Args:
        a_row: multiplications of a row without ΔW, e.g. R (i + o) with factors of rank R.
        forming: of ΔW, so many multiplications for each of its entries.
        d_in: i.
        d_out: o.

    Returns:
        `StructuredBank.few` and `few_alone`.
    """
    size = d_in * d_out
    few, alone = (
        math.inf if 4 * a_row <= times * size else 4 * forming * size / (4 * a_row - times * size) for times in (3, 1)
    )
    return few, alone


class FusedChanges(Fused):
    """Base and weight changes on rows (*rows, i): one product where the routing is the same on all of them."""

    __slots__ = ()

    bank: StructuredBank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W^T + b + Σ_e w_e ΔW_e x, (*rows, o)."""
        bank = self.bank
        plain = is_plain(x, routing.weights) and not (bank.training and bank.dropout)
        if not plain or not bank.is_one_weight(x, routing):
            return super().add_linear(x, routing, weight, bias)
        return change_mixture(x, routing.weights, routing.indices, bank.changes(x), weight, bias)
