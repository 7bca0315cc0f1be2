"""Adapter folders of other libraries: their configuration and their tensors, read in one place."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..delta import all_finite
from ..errors import CheckpointError, NumericsError, shown
from .json_files import read_json
from .tensor_files import Checkpoint

# what torch's reader of pickles ends in, on bytes that nobody wrote so
DAMAGE = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error),
)
CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Foreign:
    """A folder of another library.

    Args:
        path: the folder.
        config: its adapter_config.json.
        tensors: its weights, name -> tensor, e.g. factors (r, i) and (o, r).
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def kind(self) -> str:
        """peft_type of the configuration."""
        return str(self.config.get("peft_type"))


def is_foreign(folder: Path) -> bool:
    """Tell whether a folder holds an adapter of another library, and no checkpoint of moa."""
    return (folder / CONFIG).is_file() and not (folder / "model.safetensors").is_file()


def read_foreign(folder: Path) -> Foreign:
    """Return what a folder holds; of a pickled .bin only tensors are read, and nothing in it runs.

    The tensors of a safetensors file are read when they are asked for.

    Raises:
        CheckpointError: a file is missing, damaged, or holds more than tensors.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not an adapter folder: {CONFIG} is missing in it.")
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{folder} is not an adapter folder: {' or '.join(WEIGHTS)} is missing in it.")
    config = read_json(folder / CONFIG)
    if file.suffix == ".safetensors":
        return Foreign(folder, config, Checkpoint(file))
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise CheckpointError(f"{file} cannot be read: {type(error).__name__}: {shown(error, 300)}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file} holds {type(tensors).__name__}: expected a mapping name -> tensor.")
    return Foreign(folder, config, tensors)


def check_fields(found: Foreign, fields: Mapping[str, tuple[type, ...]]) -> None:
    """Check the types of a configuration's values, and that its numbers are finite and not negative; no tensors.

    Args:
        found: the folder.
        fields: key -> the types that its value may have; one that is missing or null is left to its default.

    Raises:
        CheckpointError: another type; the key is named.
    """
    for key, types in fields.items():
        value = found.config.get(key)
        if value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        usable = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if not usable or (number and not (math.isfinite(value) and value >= 0)):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise CheckpointError(
                f"{found.path / CONFIG} has {key}={shown(repr(value))}: expected {wanted}, at least 0."
            )


def check_numbers_of(found: Foreign) -> None:
    """Check that every tensor of a folder, of any shape, holds finite floating numbers.

    Raises:
        CheckpointError: one holds whole numbers.
        NumericsError: one holds NaN or infinity; it is named.
    """
    for name, tensor in found.tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{found.path} holds {shown(repr(name))} as {tensor.dtype}: expected floating numbers."
            )
        if not all_finite(tensor):
            raise NumericsError(f"{shown(repr(name))} in {found.path} holds NaN or infinity: its training diverged.")


def refuse(found: Foreign, options: Mapping[str, str]) -> None:
    """Refuse options of a configuration that are set.

    Args:
        found: the folder.
        options: key -> why it has no counterpart.

    Raises:
        CheckpointError: one is set; it is named.
    """
    for key, reason in options.items():
        if found.config.get(key):
            raise CheckpointError(f"{found.path} sets {key}={found.config[key]!r}: {reason}.")
