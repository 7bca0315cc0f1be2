"""One expert in place of the routers: the same for every example of a block of code, or one for each of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ..mixture.change import check_expert
from ..types import Pinned
from .chosen import OURS, chosen_experts, number_of, take_ids
from .host import Host


class Pinning(Host):
    """A host whose experts can be used one at a time."""

    _input_names: Sequence[str]

    def pin_expert(self, expert: int | str) -> contextlib.AbstractContextManager[None]:
        """Use one expert with weight 1 in place of the routers inside the block; what is trained whole stays trained.

        It is the model that `export_expert` writes, as `adapter_ids` is, which chooses an expert for each example. A
        layer with one expert beside layers with several, such as MixLoRA's attention, keeps it for every number.

        Args:
            expert: its number or its name.

        Raises:
            ContextError: an unknown name.
            ConfigError: no layer has such an expert, or, in a forward, one with several has not; inside `folded`.
        """
        number = number_of(expert, self.expert_names) if isinstance(expert, str) else expert
        check_expert(number, (recipe.n_experts for recipe, _ in self.recipes))
        return self._set("pin_expert", "pinned", Pinned.of([number]))

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts in order, their numbers where they have none.

        They are those that all recipes with several experts have in common.
        """
        return list(self.scope.names)

    def _chosen(self, ids: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Pinned | None:
        """Return the expert of each example of a call, taken out of its keywords, or None; see `chosen_experts`."""
        if ids is not None:
            kwargs[OURS] = ids
        ids = take_ids(kwargs, self._input_names)
        if ids is None:
            return None
        self._check_not_folded(OURS)
        return chosen_experts(ids, self.scope.names, kwargs, args)
