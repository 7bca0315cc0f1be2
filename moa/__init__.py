"""moa: mixtures of adapters behind a router, for PyTorch and Hugging Face models."""

from __future__ import annotations

# ruff: noqa: F401
import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that holds it; loaded on first use, so that `import moa` costs next to nothing
_HOMES = {
    "build": "build",
    "load": "build",
    "MoAModel": "model",
    "RoutingMonitor": "callbacks",
    "Routing": "types",
    "Context": "types",
    "Trace": "trace",
    "Router": "routers",
    "ExpertBank": "experts",
    "Branch": "mixture",
    "Mixture": "mixture",
    "Recipe": "recipes",
    "Site": "recipes",
    "RECIPES": "recipes",
    "make_recipe": "recipes",
    "register_recipe": "recipes",
    "export_expert": "peft_format",
    "fold": "folding",
    "distill": "distill",
    "MoaError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .build import build, load
    from .callbacks import RoutingMonitor
    from .distill import distill
    from .errors import MoaError
    from .experts import ExpertBank
    from .folding import fold
    from .mixture import Branch, Mixture
    from .model import MoAModel
    from .peft_format import export_expert
    from .recipes import RECIPES, Recipe, Site, make_recipe, register_recipe
    from .routers import Router
    from .trace import Trace
    from .types import Context, Routing


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Importing `moa.build` the module must not hide `moa.build` the function: Python would bind it to the package."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
