"""moa: mixtures of adapters behind a router, for PyTorch and Hugging Face models."""

from __future__ import annotations

# ruff: noqa: F401
import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that holds it; loaded on first use, so that `import moa` costs next to nothing
_HOMES = {
    "build": "model.build",
    "load": "model.build",
    "MoAModel": "model.moa_model",
    "RoutingMonitor": "monitor.callback",
    "Routing": "types",
    "Context": "types",
    "Trace": "objective",
    "Router": "routers",
    "ExpertBank": "experts",
    "Family": "experts",
    "FAMILIES": "experts",
    "register_expert": "experts",
    "Delta": "delta",
    "Branch": "mixture",
    "Mixture": "mixture",
    "Recipe": "recipes",
    "Site": "layers",
    "RECIPES": "recipes",
    "make_recipe": "recipes",
    "register_recipe": "recipes",
    "export_expert": "formats.peft_export",
    "fold": "folding.weights",
    "distill": "training.distill",
    "initialize": "training.initialize",
    "allocate_ranks": "federated.importance",
    "compare": "monitor.compare",
    "transfer": "training.transfer",
    "prune": "training.pruning",
    "recover": "training.recovery",
    "MoaError": "errors",
}

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .delta import Delta
    from .errors import MoaError
    from .experts import FAMILIES, ExpertBank, Family, register_expert
    from .federated.importance import allocate_ranks
    from .folding.weights import fold
    from .formats.peft_export import export_expert
    from .layers import Site
    from .mixture import Branch, Mixture
    from .model.build import build, load
    from .model.moa_model import MoAModel
    from .monitor.callback import RoutingMonitor
    from .monitor.compare import compare
    from .objective import Trace
    from .recipes import RECIPES, Recipe, make_recipe, register_recipe
    from .routers import Router
    from .training.distill import distill
    from .training.initialize import initialize
    from .training.pruning import prune
    from .training.recovery import recover
    from .training.transfer import transfer
    from .types import Context, Routing


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'moa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
