"""What of a base carries no experts, in words."""

from __future__ import annotations

from torch import nn

from ..layers import features, holds_codes
from .mixture import Mixture


def without_sizes(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module of what looks like a packed linear layer and does not say its sizes, outside mixtures.

    Args:
        model: any module.
    """
    hidden = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, Mixture))
    return {
        name: module
        for name, module in model.named_modules()
        if name and features(module) is None and holds_codes(module) and not name.startswith(hidden)
    }


def said_of_sizeless(model: nn.Module) -> str:
    """Return what to say of layers that hold codes and show no sizes, and what to do; "" where there are none.

    Args:
        model: any module.
    """
    found = without_sizes(model)
    if not found:
        return ""
    kinds = {f"{type(m).__module__}.{type(m).__qualname__}": name for name, m in reversed(found.items())}
    named = ", ".join(f"{kind} ({name})" for kind, name in reversed(kinds.items()))
    return (
        f"{len(found)} layers hold codes and do not show their sizes, of class {named}: set in_features and "
        "out_features on them to adapt them"
    )
