"""Mixtures that see the same rows as one: their gates and down factors are one matrix, so one product serves them all.

An engine fuses q, k, v and gate, up; a decoding step has few rows and pays for calls. Apart, three mixtures are three
gates, three shrinks and three expands; stacked, they are one product, one choice, and an expand into each slice of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...experts import LoRABank
from ...kernels import Gate
from ...mixture import Branch
from .axis import Axis

MOST_ROWS = 64  # beyond, a product of only the chosen experts costs less than one of all experts on all rows


class Stacked:
    """P mixtures of low-rank experts behind linear gates, over the same rows x (T, i).

    The routers' weights and the banks' down factors become views of one matrix, and selection biases of another: what
    is loaded later goes into them.

    Args:
        branches: one for each mixture, of gates and experts that `alike` has found alike.
        slices: of y (T, Σ o), where each adds.
        axes: how each output is cut over ranks.
    """

    def __init__(self, branches: Sequence[Branch], slices: Sequence[slice], axes: Sequence[Axis]) -> None:
        self.routers = [branch.router for branch in branches]
        self.slices = list(slices)
        banks = [cast(LoRABank, branch.bank) for branch in branches]
        self.scaling, (n_experts, rank, _) = banks[0].scaling, banks[0].down.shape
        self.shape = len(banks), n_experts, rank
        gates = [cast(Tensor, router.weight) for router in self.routers]  # (E, i)
        self.ups = [axis.own(bank.up.data.flatten(0, 1)) for bank, axis in zip(banks, axes, strict=True)]  # (E·r, o)
        held = [*gates, *(bank.down for bank in banks)]
        self.matrix = torch.cat([tensor.data.flatten(0, -2) for tensor in held])  # (P·E + P·E·r, i)
        rows = self.matrix.split([tensor.data.flatten(0, -2).shape[0] for tensor in held])
        for tensor, own in zip(held, rows, strict=True):
            tensor.data = own.view_as(tensor)
        self.gate = cast(Gate, self.routers[0].gate())
        if self.gate.bias is not None:
            biases = [cast(Tensor, router.selection_bias) for router in self.routers]  # (E,)
            self.gate = self.gate._replace(bias=torch.stack(biases))  # (P, E)
            for tensor, own in zip(biases, cast(Tensor, self.gate.bias), strict=True):
                tensor.data = own

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add each mixture of x (T, i) to its slice of y (T, Σ o), and return the experts' weights (T, P, E)."""
        n_parts, n_experts, _ = self.shape
        hidden = F.linear(x.to(self.matrix.dtype), self.matrix)  # (T, P·E + P·E·r)
        logits, hidden = hidden.tensor_split([n_parts * n_experts], -1)
        logits = logits.unflatten(-1, (n_parts, n_experts))  # (T, P, E)
        weights, indices, _ = self.gate.decide(logits)  # (T, P, K)
        if indices is not None:
            weights = torch.zeros_like(logits).scatter_(-1, indices, weights)  # (T, P, E)
        mixed = hidden.unflatten(-1, self.shape) * weights.unsqueeze(-1)  # (T, P, E, r)
        for values, own, up in zip(mixed.flatten(2).unbind(1), self.slices, self.ups, strict=True):
            target = y[:, own]  # (T, o)
            if target.dtype == up.dtype:
                target.addmm_(values, up, alpha=self.scaling)
            else:
                target.copy_(torch.addmm(target.to(up.dtype), values, up, alpha=self.scaling))
        return weights


def alike(branches: Sequence[Branch]) -> bool:
    """Return whether branches may be stacked: linear gates that decide the same way, low-rank experts of one shape."""
    kinds = set()
    for branch in branches:
        gate, bank = branch.router.gate(), branch.bank
        if gate is None or type(bank) is not LoRABank or branch.tap != "input":
            return False
        decision = gate.k, gate.score, gate.renormalize, gate.bias is None, gate.weight.dtype
        kinds.add((decision, tuple(bank.down.shape), bank.down.dtype, bank.scaling))
    return len(kinds) == 1
