"""What the kernels offer for a bank: the base, the gate or the slots of a block in one step with the experts.

This file holds the definition, which runs for every bank; a family with kernels overrides what they do faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import Gate
from ..types import Routing


class Bank(Protocol):
    """What this file needs of an `ExpertBank`: (x (*rows, i), routing) -> (*rows, o)."""

    n_experts: int

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """Return the mixture, (*rows, o), of x (*rows, i)."""


class Fused:
    """A bank's mixture together with what stands beside it; constants are left to the mixture.

    Args:
        bank: the experts.
    """

    __slots__ = ("bank",)

    def __init__(self, bank: Bank) -> None:
        self.bank = bank

    def add_linear(self, x: Tensor, routing: Routing, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return base and mixture together, x W^T + b + Σ_e w_e E_e(x), (*rows, o).

        Args:
            x: (*rows, i).
            routing: whose rows broadcast against x's.
            weight: (o, i) frozen.
            bias: (o,) or None.
        """
        y = F.linear(x, weight, bias)
        return y + self.bank(x, routing).to(y.dtype)

    def add_gated(self, x: Tensor, gate: Gate, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Routing] | None:
        """Return `add_linear` (*rows, o) together with its routing, which a linear gate decides.

        None where the family, or this call, has no way to form both at once.

        Args:
            x: (*rows, i).
            gate: see `Router.gate`.
            weight: (o, i) frozen.
            bias: (o,) or None.
        """
        return None

    def shared_hidden(self, others: Sequence[Fused], x: Tensor, indices: Tensor) -> list[Tensor]:
        """Return what `open_slots` of each bank would form first, (*rows, K, r), in one product for all of them.

        Empty where the families do not share such a product.

        Args:
            others: of the banks that see the same x and routing, this one included.
            x: (*rows, i).
            indices: (*rows, K) the experts.
        """
        return []

    def open_slots(self, x: Tensor, indices: Tensor, onto: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return onto + E_{e_k}(x) for each slot k, (*rows, K, o): one chosen expert in each, with weight 1.

        Args:
            x: (*rows, i).
            indices: (*rows, K) the experts.
            onto: (*rows, o) what every slot adds to.
            hidden: (*rows, K, r) of `shared_hidden`, where it is known already.
        """
        one = x.new_ones(*x.shape[:-1], 1)
        # slot by slot, so that all of them share x, which is kept for the backward pass
        slots = [self.bank(x, Routing(one, chosen.unsqueeze(-1), self.bank.n_experts)) for chosen in indices.unbind(-1)]
        return onto.unsqueeze(-2) + torch.stack(slots, -2).to(onto.dtype)

    def close_slots(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """Return Σ_k w_k E_{e_k}(x_k), (*rows, o): each slot has an input of its own.

        Args:
            x: (*rows, K, i).
            weights: (*rows, K).
            indices: (*rows, K) the experts.
        """
        return self.bank(x, Routing(weights.unsqueeze(-1), indices.unsqueeze(-1), self.bank.n_experts)).sum(-2)
