"""Experts beside a sub-layer: they read what its first layer reads, and add to what its last one writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..errors import ShapeError
from ..layers import Site
from ..types import Decision, Scope
from .blocks import Block
from .mixture import Branch, Mixture, add_constants


class ParallelEntry(Mixture):
    """The first layer of a sub-layer: its experts see x (*rows, i), and leave what they add for the last layer.

    Args:
        first: the layer, as it is.
        branches: the experts beside the sub-layer.
        scope: shared by all mixtures of the model.
        last: name of the layer that adds.
        block: under which what they add waits.
    """

    why_not_fold = "its experts stand beside a whole sub-layer, which has no one weight"

    def __init__(self, first: Site, branches: list[Branch], scope: Scope, last: str, block: Block) -> None:
        super().__init__(first.module, branches, scope, first.name)
        self.last, self.block = last, block

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x), (*rows, o); what the experts make of x (*rows, i) waits in the context."""
        y: Tensor = self.base(x, *args, **kwargs)
        if not self.context.enabled:
            return y
        self.check_differentiable(x, y)
        for number, branch in enumerate(self.branches):
            assert isinstance(branch, Branch)
            routing = self.route(branch, x, self.context)
            beside = add_constants(branch.bank(self.seen_by(branch.bank, x), routing), branch.bank, routing)
            if number:
                before = self.context.decisions[self.block].beside
                assert before is not None
                beside = before + beside
            self.context.decisions[self.block] = Decision(routing, beside=beside)
        return y


class ParallelExit(Mixture):
    """The last layer of a sub-layer, which adds what the experts beside it have made of the sub-layer's input.

    Args:
        last: the layer, as it is.
        scope: shared by all mixtures of the model.
        block: under which what the experts add waits, with the name of their layer.
    """

    why_not_fold = ParallelEntry.why_not_fold

    def __init__(self, last: Site, scope: Scope, block: Block) -> None:
        super().__init__(last.module, [], scope, last.name)
        self.block = block

    @property
    def decided_at(self) -> str:
        """Name of the first layer, on whose rows (*rows, i) the router decides."""
        return self.block.name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) and what the experts add, (*rows, o), for x (*rows, i)."""
        y0: Tensor = self.base(x, *args, **kwargs)
        if not self.context.enabled:
            return y0
        self.check_differentiable(x, y0)
        beside = self.context.decided(self.block).beside
        del self.context.decisions[self.block]
        assert beside is not None
        if beside.shape != y0.shape:
            raise ShapeError(
                f"{self.name} writes {tuple(y0.shape)}, and the experts beside it saw rows of {self.block} that give "
                f"{tuple(beside.shape)}: this model does not run the two on the same rows. Choose place='sequential'."
            )
        return self.kept(y0 + beside.to(y0.dtype), y0)


def parallel_layers(sites: Sequence[Site], build: Callable[[Site], list[Branch]], scope: Scope) -> list[Mixture]:
    """Return the mixtures of sub-layers with experts (*rows, i) -> (*rows, o) beside them, one for each site.

    Args:
        sites: the first and the last layer of each sub-layer in turn.
        build: makes the branches of one, whose site reads as the first layer does and writes as the last.
        scope: shared by all mixtures of the model.

    Source: He et al. 2022, arXiv 2110.04366, table 1 (parallel adapters).
    """
    layers: list[Mixture] = []
    for first, last in zip(sites[::2], sites[1::2], strict=True):
        branches = build(dataclasses.replace(first, d_out=last.d_out, place="parallel"))
        block = Block(first.name)
        layers += [ParallelEntry(first, branches, scope, last.name, block), ParallelExit(last, scope, block)]
    return layers
