"""Adapter sets by the precision of their base: a folder a set, `4-bit/`, `8-bit/`, each a checkpoint by itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, ConfigError

NAME = re.compile(r"(\d+)-bit")


def set_folder(root: str | Path, bits: int) -> Path:
    """Return the folder of one set among those in a folder; no tensors."""
    return Path(root) / f"{bits}-bit"


def stored_sets(root: str | Path) -> list[int]:
    """Return the precisions, in bits, that a folder has sets for; no tensors."""
    if not Path(root).is_dir():
        return []
    found = (NAME.fullmatch(entry.name) for entry in Path(root).iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def bits_of(base: nn.Module) -> int:
    """Return the precision of a base's weights (o, i): bits a weight.

    Raises:
        ConfigError: a quantisation whose configuration does not say it.
    """
    config: Any = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None:
        return next(p for p in base.parameters() if p.is_floating_point()).dtype.itemsize * 8
    values = config if isinstance(config, dict) else config.to_dict()
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if values.get(name):
            return bits
    said = next((values[key] for key in ("bits", "nbits", "w_bit", "weight_bits") if values.get(key)), None)
    if not isinstance(said, int):
        raise ConfigError(
            f"the base is quantised by {values.get('quant_method')!r}, whose configuration does not say how many bits "
            "a weight has: name the folder of the set, e.g. OUT/4-bit."
        )
    return said


def set_for(path: str | Path, base: nn.Module) -> Path:
    """Return the folder of the set that belongs to a base, (B, S) -> outputs; a folder without sets is itself.

    Raises:
        CheckpointError: there are sets, and none for this base.
        ConfigError: see `bits_of`.
    """
    sets = stored_sets(path)
    if not sets:
        return Path(path)
    bits = bits_of(base)
    if bits not in sets:
        raise CheckpointError(
            f"{path} has adapters for bases of {', '.join(map(str, sets))} bits, this base has {bits}: load one of "
            "those, or name a set's folder to put it on another base."
        )
    return set_folder(path, bits)
