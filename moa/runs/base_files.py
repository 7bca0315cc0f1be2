"""A base looked at before it is loaded: its files whole, its positions enough. Nothing heavy is imported."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..formats.headers import read_header
from .yaml_values import is_folder, shortened

POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
# these number their positions from the padding token on
OFFSET = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "esm", "data2vec-text")


def check_base(base: str, max_length: int) -> None:
    """Check the base of a run as far as its files tell: a hub id is looked at when it is loaded.

    Raises:
        ConfigError: no such folder, a configuration that is none, a truncated weights file, or fewer positions than
            max_length.
    """
    if not is_folder(base):
        if looks_like_a_path(base):
            raise ConfigError(f"base: there is no folder {shortened(base)} (looked from {Path.cwd()}).")
        return
    file = Path(base) / "config.json"
    if file.is_file():
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError(f"base: {file} cannot be read as JSON: {error}.") from error
        if not isinstance(values, dict):
            raise ConfigError(f"base: {file} holds a {type(values).__name__}, expected an object.")
        check_positions(values, max_length)
    for weights in sorted(Path(base).glob("*.safetensors")):
        check_whole(weights)


def looks_like_a_path(base: str) -> bool:
    """Tell whether a name is a path and cannot be a hub id, which is NAME or OWNER/NAME."""
    return base.startswith((".", "~", os.sep)) or base.count("/") > 1 or "\\" in base or len(base) > 200


def check_positions(config: Mapping[str, Any], max_length: int) -> None:
    """Check that rows of max_length tokens have positions in a model with these configuration values.

    Raises:
        ConfigError: they have not.
    """
    inner = config.get("text_config")
    values = {**inner, **config} if isinstance(inner, Mapping) else config
    found = next((values[key] for key in POSITIONS if isinstance(values.get(key), int)), None)
    if found is None or found < 1:
        return
    if values.get("model_type") in OFFSET:
        found -= int(values.get("pad_token_id") or 0) + 1
    if max_length > found:
        raise ConfigError(f"max_length={max_length} is above the {found} positions of the base: set at most {found}.")


def check_whole(file: Path) -> None:
    """Check that a safetensors file is as long as its header says; no tensor is read.

    Raises:
        ConfigError: it is truncated or no such file.
    """
    try:
        read_header(file)
    except CheckpointError as error:
        raise ConfigError(f"base: {error}") from error
