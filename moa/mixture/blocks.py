"""Blocks whose layers share something: one routing over a feed-forward block, streams that run side by side.

Feng et al. 2024 and Li et al. 2024 (experts that are whole feed-forward blocks over one frozen block).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..routers import Router
from ..types import Context, Decision, Routing, Scope
from .mixture import Branch, Mixture, add_constants


class Block:
    """Which layers belong together; what they share in one forward is a `Decision` in the context, under this object.

    Under its name, compiled code would be tied to the name, and each block of a stack would need a graph of its own.

    Args:
        name: of the first layer.
        openers: branches of the layers that open the block.
    """

    def __init__(self, name: str, openers: tuple[Branch, ...] = ()) -> None:
        self.name, self.openers = name, openers

    def __str__(self) -> str:
        return self.name

    def hidden(self, decision: Decision, number: int, x: Tensor) -> Tensor | None:
        """Return an opener's hidden values (*rows, K, r) of x (*rows, i), or None where its bank forms them itself.

        Layers that see the same x share one product: x is read, and its gradient written, once.
        """
        indices = decision.routing.indices
        assert indices is not None
        if x is not decision.source:
            banks = [opener.bank for opener in self.openers]
            found = banks[number].fused.shared_hidden([bank.fused for bank in banks], x, indices)
            decision.source = x
            decision.hidden = dict(enumerate(found))
        # pop, not get: a recomputed forward may stop early, and a kept entry would keep activations alive.
        hidden = decision.hidden.pop(number, None)
        if not decision.hidden:
            decision.source = None
        return hidden


class FollowRouter(Router):
    """Gives the routing that the first layer of the block has decided; it decides nothing.

    Args:
        d_in: i of its own layer.
        leader: the router that decides.
        block: under which it leaves its decision in the context.
    """

    def __init__(self, d_in: int, leader: Router, block: Block) -> None:
        super().__init__(d_in, leader.n_experts, leader.k)
        self.causal, self.per_row, self.rowwise = leader.causal, leader.per_row, leader.rowwise
        self.block = block

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the block's routing, weights (*rows, K)."""
        return context.decided(self.block).routing


class BlockLayer(Mixture):
    """A layer of a block whose experts are whole blocks: y = Σ_k w_k block_{e_k}(x), not a sum in each layer.

    Between the first layers and the last, every row has one slot per active expert: an axis K before the features.
    Whatever lies between (activations, products, dropout, norms over features) sees it as one more row axis.

    Args:
        base: the frozen layer.
        branches: one; the first layer's holds the router, the others a `FollowRouter`.
        scope: shared by all mixtures of the model.
        name: dotted path of the layer.
        block: which it belongs to.
    """

    why_not_fold = "it is a layer of a block whose experts are whole blocks"

    def __init__(self, base: nn.Module, branches: list[Branch], scope: Scope, name: str, block: Block) -> None:
        super().__init__(base, branches, scope, name)
        self.block = block

    @property
    def decided_at(self) -> str:
        """Name of the first layer of its block, on whose rows (*rows, i) the router decides."""
        return self.block.name

    @property
    def branch(self) -> Branch:
        """The one branch."""
        branch = self.branches[0]
        assert isinstance(branch, Branch)
        return branch


class BlockEntry(BlockLayer):
    """A first layer of a block: opens a slot for each active expert, (*rows, i) -> (*rows, K, o).

    The frozen product is formed once per row, not once per expert.

    Args:
        number: of those that open the block; the first one's router decides.
    """

    def __init__(self, *args: Any, number: int) -> None:
        super().__init__(*args)
        self.number = number

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) + E_{e_k}(x) for each slot k, (*rows, K, o); with experts switched off base(x), (*rows, o)."""
        base_out: Tensor = self.base(x, *args, **kwargs)
        if not self.context.enabled:
            return base_out
        self.check_differentiable(x, base_out)
        branch = self.branch
        if self.number == 0:
            self.context.decisions[self.block] = Decision(_on_rows(self.route(branch, x, self.context), x))
        decision = self.context.decided(self.block)
        routing = decision.routing
        if routing.weights.shape[:-1] != x.shape[:-1]:
            raise ShapeError(
                f"{self.name} sees rows {tuple(x.shape[:-1])}, the first layer of its block saw "
                f"{tuple(routing.weights.shape[:-1])}: they do not belong to one block."
            )
        assert routing.indices is not None
        hidden = self.block.hidden(decision, self.number, x)
        slots = branch.bank.fused.open_slots(x, routing.indices, base_out, hidden)  # (*rows, K, o)
        chosen = routing.indices.unsqueeze(-1)
        each = Routing(torch.ones_like(chosen, dtype=x.dtype), chosen, routing.n_experts)
        return self.kept(add_constants(slots, branch.bank, each), base_out.unsqueeze(-2))


class BlockExit(BlockLayer):
    """The last layer of a block: closes the slots, (*rows, K, i) -> (*rows, o).

    W is linear, so Σ_k w_k (W h_k + b) = W Σ_k w_k h_k + b Σ_k w_k: its product, too, is formed once per row.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return Σ_k w_k (base(x_k) + E_{e_k}(x_k)), (*rows, o), of slots x (*rows, K, i)."""
        if not self.context.enabled:
            out: Tensor = self.base(x, *args, **kwargs)
            return out
        routing = self.context.decided(self.block).routing
        del self.context.decisions[self.block]  # what follows is another block's
        if x.shape[:-1] != routing.weights.shape:
            raise ShapeError(
                f"{self.name} expected slots {(*routing.weights.shape, 'i')} and got {tuple(x.shape)}: every layer "
                "that opens its block must be among the targets."
            )
        assert routing.indices is not None
        weights = routing.weights.unsqueeze(-1)
        mixed = (x * weights.to(x.dtype)).sum(-2)
        y: Tensor = self.base(mixed, *args, **kwargs)
        self.check_differentiable(mixed, y)
        if self.bias is not None:
            y = y + (weights.sum(-2) - 1).to(y.dtype) * self.bias.to(y.dtype)
        bank = self.branch.bank
        out = y + bank.fused.close_slots(x, routing.weights, routing.indices).to(y.dtype)
        return self.kept(add_constants(out, bank, routing), y)


def routed_block(
    entries: Sequence[tuple[nn.Module, str, Branch]],
    last: tuple[nn.Module, str, Branch],
    scope: Scope,
) -> list[Mixture]:
    """Return the layers of one block whose experts are whole blocks, entries first.

    Args:
        entries: (layer, name, branch) of those that read the block's input, in the order in which they run; the first
            one's branch holds the router, whose rows (*rows, K) all of them share.
        last: (layer, name, branch) of the one that writes the block's output.
        scope: shared by all mixtures of the model.

    Source: Li et al. 2024 (MixLoRA), arXiv 2404.15159, §3.2.
    Differs: the paper's last layer multiplies once per active expert; here all frozen products run once per row.
    """
    block = Block(entries[0][1], tuple(branch for _, _, branch in entries))
    leader = entries[0][2].router
    for _, _, branch in [*entries[1:], last]:
        branch.router = FollowRouter(branch.bank.d_in, leader, block)
    layers: list[Mixture] = []
    for number, (module, name, branch) in enumerate(entries):
        layers.append(BlockEntry(module, [branch], scope, name, block, number=number))
    module, name, branch = last
    return [*layers, BlockExit(module, [branch], scope, name, block)]


def _on_rows(routing: Routing, x: Tensor) -> Routing:
    """Return the routing expanded to the rows of x (*rows, i), with indices."""
    rows = x.shape[:-1]
    weights = routing.weights.expand(*rows, routing.k)
    indices = routing.indices
    if indices is None:
        indices = torch.arange(routing.n_experts, device=x.device)
    return Routing(weights, indices.expand(*rows, routing.k), routing.n_experts)
