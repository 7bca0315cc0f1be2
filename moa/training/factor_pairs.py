"""The experts of a model that are two trained factors of their own: what some strategies are for."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from ..experts.lora import LoRABank
from ..model.host import Host


def factored_banks(model: Host, what: str) -> dict[str, LoRABank]:
    """Return the bank of every branch, whose parameters are down (E, r, i) and up (E, r, o), by its layer's name.

    A layer that has several, as a base's own fused experts do, has "name", "name#1", ….

    Args:
        model: with experts.
        what: needs such pairs, in the error.

    Raises:
        ConfigError: experts that are something else, or that are not trained; the layer is named.
    """
    found: dict[str, LoRABank] = {}
    for name, branch in model.branches():
        bank: Any = branch.bank
        own = type(bank).factors is LoRABank.factors  # neither drawn, derived nor padded
        if not own or not (bank.down.requires_grad and bank.up.requires_grad):
            kind = f"{type(bank).__name__} experts hold no two factors that are trained"
            raise ConfigError(f"{name}: {kind}, and {what} such pairs: choose expert='lora'.")
        others = sum(layer_of(key) == name for key in found)
        found[f"{name}#{others}" if others else name] = bank
    return found


def layer_of(key: str) -> str:
    """Return the layer of a key of `factored_banks`; no tensors, so no shapes."""
    return key.partition("#")[0]
