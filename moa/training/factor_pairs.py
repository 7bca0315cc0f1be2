"""The experts of a model that are two trained factors of their own: what some strategies are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError
from ..experts.lora import LoRABank
from ..model.host import Host


def factored_banks(model: Host, what: str) -> Iterator[tuple[str, LoRABank]]:
    """Yield (layer name, bank) of every branch, whose parameters are down (E, r, i) and up (E, r, o).

    Args:
        model: with experts.
        what: needs such pairs, in the error.

    Raises:
        ConfigError: experts that are something else, or that are not trained; the layer is named.
    """
    for name, branch in model.branches():
        bank: Any = branch.bank
        own = type(bank).factors is LoRABank.factors  # neither drawn, derived nor padded
        if not own or not (bank.down.requires_grad and bank.up.requires_grad):
            kind = f"{type(bank).__name__} experts hold no two factors that are trained"
            raise ConfigError(f"{name}: {kind}, and {what} such pairs: choose expert='lora'.")
        yield name, bank
