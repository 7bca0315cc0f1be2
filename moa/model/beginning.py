"""What all layers of a recipe share learns where a forward begins and ends, to be ready for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

from torch import nn

from ..experts import ExpertBank
from ..mixture import Branch
from ..types import Context
from .scope import ModelScope
from .sound import Sound


class Beginning(Sound):
    """A model that looks at its routers before a forward, and tells what its layers share.

    Attributes:
        scope: gives the mixtures the context of the forward that runs.
        shared_by_layers: what the layers of a recipe have together, by the recipe's number and who calls it.
    """

    scope: ModelScope
    shared_by_layers: nn.ModuleDict
    branches: Callable[[], Iterator[tuple[str, Branch]]]

    _told: tuple[list[Any], list[ExpertBank]] | None = None  # who wants to know, and the banks that there are

    def forward_begins(self, context: Context) -> None:
        """Check the routers, and call `begin` of what wants to know; on rows (*rows, i) of any kind.

        Raises:
            NumericsError: a router is not finite.
        """
        self.check_routers(context)
        if self._told is None:
            self._told = self._wanting(), [branch.bank for _, branch in self.branches()]
        for module in self._told[0]:
            module.begin(self._told[1])

    def forward_ends(self) -> None:
        """Call `end` of what wanted to know that a forward on rows (*rows, i) has begun."""
        for module in self._wanting() if self._told is None else self._told[0]:
            module.end()

    def routers_changed(self) -> None:
        """Look anew at the routers, of weights (E, i) and the like, and at the banks."""
        super().routers_changed()
        self._told = None
        self.listen()

    def listen(self) -> None:
        """Have the scope call what must run before a forward on x (*rows, i), and nothing else."""
        wanting = self._wanting()
        self.scope.before = self.forward_begins if wanting else self.check_routers
        self.scope.after = self.forward_ends if wanting else None

    def _wanting(self) -> list[Any]:
        return [module for module in self.shared_by_layers.modules() if hasattr(module, "begin")]

    def train(self, mode: bool = True) -> Self:
        """Set training mode as every module does, and look anew at routers, of weights (E, i) and the like, and banks.

        Raises:
            ConfigError: what is trained has been offloaded.
        """
        self._told = None
        return super().train(mode)
