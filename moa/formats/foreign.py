"""Adapter folders of other libraries: their configuration and their tensors, read in one place."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .json_files import read_json
from .tensor_files import Checkpoint

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
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointError(f"{file} holds {type(tensors).__name__}: expected a mapping name -> tensor.")
    return Foreign(folder, config, tensors)


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
