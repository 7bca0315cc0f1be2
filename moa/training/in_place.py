"""Column experts trained in the base's own weight: one product a layer, as without adapters, and r inputs kept.

Woo et al. 2025 (PaCA), arXiv 2503.01905.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..experts.families import PaCABank
from ..folding.weights import check_untied
from ..kernels import column_linear
from ..layers import is_dense
from ..mixture import Branch, Mixture
from ..model.host import Host


@contextlib.contextmanager
def in_place(model: Host) -> Iterator[nn.Module]:
    """Run the base with its experts' columns in its weights inside the block, where they can be trained.

    The experts' parameters are what an optimizer trains, as outside: each forward writes those that have moved into
    the weight (o, i). Afterwards the weights are as they came, bit for bit, and the mixture gives what the block gave.

    Args:
        model: with one expert of the family "paca" on every adapted layer, a plain linear one, and weight 1.

    Raises:
        ConfigError: a layer with other experts, several of them, dropout, a routing or a weight that is not 1, or a
            base that is not a dense `nn.Linear`; the layer is named; inside `folded`.
        FoldError: a weight that another module uses, too.

    Source: arXiv 2503.01905, §3.2.
    Differs: the released code copies the trained columns into the base only in some forwards of training, so that an
        evaluation can read old ones; its slice of activations knows rows of three axes only.
    """
    model._check_not_folded("training in place")
    layers = _Layers(model)

    @contextlib.contextmanager
    def inside() -> Iterator[_Layers]:
        try:
            layers.enter()
            yield layers
        finally:
            layers.leave()

    with model._swapped(inside()):
        yield model.base


class _Layers:
    """All layers of a model while their columns lie in their weights."""

    def __init__(self, model: Host) -> None:
        self.layers: list[_Layer] = []
        for mixture in model.mixtures().values():
            check_untied(model.base, mixture)
            self.layers.append(_Layer(mixture))

    def enter(self) -> None:
        """Let every layer (i -> o) train its columns."""
        for layer in self.layers:
            layer.enter()

    def leave(self) -> None:
        """Give every layer (i -> o) its columns back."""
        for layer in self.layers:
            layer.leave()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Run with the weights (o, i) as they came inside the block."""
        self.leave()
        try:
            yield
        finally:
            self.enter()


class _Layer:
    """A base's linear layer while its columns lie in its weight."""

    def __init__(self, mixture: Mixture) -> None:
        self.base: Any = mixture.base
        branch = mixture.branches[0] if len(mixture.branches) == 1 else None
        bank = branch.bank if isinstance(branch, Branch) else None
        if not isinstance(bank, PaCABank) or bank.n_experts != 1 or bank.dropout:
            raise ConfigError(
                f"{mixture.name}: only one expert of the family 'paca', without dropout, can be trained in place: "
                "build with router='fixed', n_experts=1, expert='paca'."
            )
        assert isinstance(branch, Branch)
        routing = branch.router.constant()
        if routing is None or float(routing.dense()) != 1:
            raise ConfigError(f"{mixture.name}: its expert's weight is not always 1: build with router='fixed'.")
        if type(self.base) is not nn.Linear or not is_dense(self.base.weight) or "forward" in vars(self.base):
            raise ConfigError(
                f"{mixture.name}: a {type(self.base).__name__} is not a plain linear layer whose weight can be "
                "overwritten: train the expert beside it."
            )
        self.bank = bank
        self.columns = bank.columns[0]
        self.written: int | None = None
        self.kept: Tensor | None = None

    @torch.no_grad()
    def enter(self) -> None:
        """Keep the columns (o, r) as they came, and let the layer train them."""
        self.kept = self.base.weight[:, self.columns].clone()
        self.written = None
        self.base.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (*rows, o) for x (*rows, i), after writing the columns if they have moved."""
        up = self.bank.up
        if self.written != up._version:
            with torch.no_grad():
                assert self.kept is not None
                moved = self.kept.to(up.dtype) + up[0].T * self.bank.scaling  # (o, r)
                self.base.weight.data[:, self.columns] = moved.to(self.base.weight.dtype)
            self.written = up._version
        return column_linear(x, self.base.weight, self.base.bias, up[0], self.columns, self.bank.scaling)

    @torch.no_grad()
    def leave(self) -> None:
        """Write the columns (o, r) back."""
        if self.kept is not None:
            del self.base.forward
            self.base.weight.data[:, self.columns] = self.kept
            self.kept = None
