"""What a checkpoint says of itself, checked before anything is made of it: types, and sizes against its tensors."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError, shown

SIZE_NAMES = r"(n|d)_\w+|(\w+_)?rank|width|depth"  # options of recipes that are sizes of tensors
HARMLESS = 2**16  # a claim up to this size costs little memory, used or not
FIELDS: dict[str, tuple[type, ...]] = {
    "base": (dict,),
    "recipes": (list,),
    "modules_to_save": (list,),
    "origins": (dict, type(None)),
    "base.class": (str,),
    "base.name_or_path": (str,),
    "base.config": (dict, type(None)),
    "base.fingerprint": (dict,),
}


def check_description(description: Mapping[str, Any], file: Path) -> None:
    """Check the types of what a checkpoint says of itself, before a tensor of any shape is made of it.

    Raises:
        CheckpointError: a field that is missing or of another type; it is named.
    """

    def check(value: Any, types: tuple[type, ...], what: str) -> None:
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise CheckpointError(f"{file}: {what} must be {wanted}, got {shown(repr(value))}: it was changed by hand.")

    for field, types in FIELDS.items():
        value: Any = description
        for key in field.split("."):
            value = value.get(key)
        check(value, types, field)
    for name in description["modules_to_save"]:
        check(name, (str,), "each of modules_to_save")
    for name, module in (description.get("origins") or {}).items():
        check(module, (str,), f"origins.{shown(name)}")
    for number, recipe in enumerate(description["recipes"]):
        check(recipe, (dict,), f"recipes[{number}]")
        check(recipe.get("router"), (str,), f"recipes[{number}].router")
        check(recipe.get("sites"), (list,), f"recipes[{number}].sites")
        for name in recipe["sites"]:
            check(name, (str,), f"each of recipes[{number}].sites")
    for name, probe in description["base"]["fingerprint"].items():
        check(probe, (dict,), f"base.fingerprint.{shown(name)}")
        for key, kind in (("shape", (int,)), ("values", (int, float))):
            check(probe.get(key), (list,), f"base.fingerprint.{shown(name)}.{key}")
            for value in probe[key]:
                check(value, kind, f"base.fingerprint.{shown(name)}.{key}")
                if abs(value) > sys.float_info.max:
                    raise CheckpointError(f"{file}: base.fingerprint.{shown(name)}.{key} holds a number out of range.")


def check_claims(description: Mapping[str, Any], tensors: Mapping[str, Tensor], file: Path) -> None:
    """Check that recipes do not claim sizes that the file's tensors cannot have, before anything of such a size exists.

    Every expert and every rank has at least one number in the file, so has every rank of every expert; where both
    are equal they may be the same thing, experts of rank 1.

    Args:
        description: of the checkpoint.
        tensors: of the file, name -> tensor of any shape.
        file: named in the error.

    Raises:
        CheckpointError: a size that the tensors cannot have.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    for recipe in description.get("recipes", ()):
        sizes = {
            key: value for key, value in recipe.items() if isinstance(value, int) and re.fullmatch(SIZE_NAMES, key)
        }
        ranks = recipe.get("rank")
        if isinstance(ranks, list):  # one for each expert
            sizes["rank"] = max([r for r in ranks if isinstance(r, int)], default=0)
            sizes["Σ rank"] = sum(r for r in ranks if isinstance(r, int))
        n_experts, rank = sizes.get("n_experts", 0), 1 if isinstance(ranks, list) else sizes.get("rank", 0)
        sizes["n_experts · rank"] = n_experts * rank if n_experts != rank else rank
        for key, value in sizes.items():
            if value > max(held, HARMLESS):
                raise CheckpointError(
                    f"{file} claims {key}={value} for {recipe.get('router')!r}, and holds {held} numbers in all: it is "
                    "damaged or was changed by hand."
                )
