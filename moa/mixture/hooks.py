"""Hooks on parts of a base: compiled code does not look for hooks that came later, so they would be ignored."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..compat import is_compiled
from ..errors import ConfigError


def check_hooks_run(model: nn.Module, hooked: Iterable[nn.Module]) -> None:
    """Check that hooks on modules inside a model, each (B, S, …) -> (B, S, …), will be called.

    Raises:
        ConfigError: one of the modules, or one around it, is compiled already; it is named.
    """
    wanted = {id(module) for module in hooked}
    for name, module in model.named_modules():
        if is_compiled(module) and any(id(inner) in wanted for inner in module.modules()):
            raise ConfigError(
                f"{name or type(model).__name__} is compiled already, and hooks that come later are ignored there: "
                "compile the model after it was built, and not at all for generation with a first pass."
            )
