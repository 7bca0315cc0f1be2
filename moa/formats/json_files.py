"""JSON that somebody else wrote: read whole or refused, with the file and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, shown

MOST_BYTES = 64 * 2**20  # the index of a model of a trillion parameters has less


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, too large, no JSON as the standard has it (a key twice, numbers of
            thousands of digits, half of a character), nested too deep, or holds something else than an object.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes: expected a description, of {MOST_BYTES} at most.")
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return parse_json(data, str(path))


def parse_json(data: str | bytes, where: str) -> dict[str, Any]:
    """Return the object in JSON text; `where` names it in errors.

    Raises:
        CheckpointError: see `read_json`.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate has no bytes, as a name or anywhere
    except RecursionError:
        raise CheckpointError(f"{where} is not JSON that can be used: it is nested too deep.") from None
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {shown(error, 200)}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a {type(value).__name__}, expected an object.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made
