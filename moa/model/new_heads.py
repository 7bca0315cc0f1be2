"""What a model has beside its pretrained body: the heads that begin at random, and are trained whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..errors import UnadaptedWarning
from ..mixture import backbone_prefix

# in the names of transformers' classes whose head does not come with the pretrained body
HEADS = (
    "Classification",
    "QuestionAnswering",
    "MultipleChoice",
    "DoubleHeads",
    "XVector",
    "SemanticSegmentation",
    "ObjectDetection",
)


def new_heads(model: nn.Module) -> list[str]:
    """Return the names of the modules, each (*rows, d) -> (*rows, C), that were not pretrained with the body.

    A class of transformers says so by its name, which a class derived from it need not repeat; in anybody else's class
    around a body, a plain module too, all is new that is neither the body nor embeddings. A parameter that such a class
    holds itself is in no module: a warning names it.

    Args:
        model: any module; one that holds no body of transformers has no heads.
    """
    known = any(kind in parent.__name__ for parent in type(model).__mro__ for kind in HEADS)
    theirs = type(model).__module__.split(".")[0] in ("transformers", "transformers_modules")
    if theirs and not known:
        return []
    prefix = backbone_prefix(model).removesuffix(".")
    bodies = [model.get_submodule(prefix)] if prefix else [m for m in model.modules() if _is_body(m) and m is not model]
    if not bodies:
        return []
    own = [] if theirs else [name for name, _ in model.named_parameters(recurse=False)]
    if own:
        warnings.warn(
            f"{type(model).__name__}: {', '.join(own)} stays frozen as it came, as a parameter that is in no module "
            "beside the body. Put it into one of its own: those are trained whole.",
            UnadaptedWarning,
            stacklevel=3,
        )
    return list(_beside(model, bodies, getattr(model, "get_output_embeddings", lambda: None)()))


def _is_body(module: Any) -> bool:
    """Whether a module is a model of transformers, which says where the body of its kind is."""
    return hasattr(module, "base_model_prefix")


def _beside(model: nn.Module, bodies: list[nn.Module], output: nn.Module | None) -> Iterator[str]:
    """Yield the names of the modules around bodies that hold parameters, none of them a body's or the output's."""
    taken = {id(p) for module in (*bodies, output) if module is not None for p in module.parameters()}
    inside = {id(module) for module in bodies}
    for name, child in model.named_children():
        parameters = [id(p) for p in child.parameters()]
        if id(child) not in inside and any(id(module) in inside for module in child.modules()):
            yield from (f"{name}.{below}" for below in _beside(child, bodies, output))
        elif parameters and not taken.intersection(parameters):
            yield name
