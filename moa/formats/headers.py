"""The header of a safetensors file, checked against the file before any tensor is made of it.

Format: the safetensors specification (8-byte little-endian header length, JSON header, tensor bytes in order).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_files import parse_json

MOST_HEADER = 100_000_000  # bytes, the specification's limit
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True)
class Entry:
    """What a header says of one tensor.

    Args:
        dtype: the specification's name of its type.
        shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return name -> what a file holds, and its metadata; no tensor of any shape is read.

    Raises:
        CheckpointError: no such file, a truncated one, or a header that does not describe the file: a name twice, a
            type that does not exist, a shape that is not as long as its bytes, bytes that overlap or are left over.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            whole = size >= 8 and 0 < length <= min(size - 8, MOST_HEADER)
            data = handle.read(length) if whole else b""
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    said = f"{file} ({size} bytes) cannot be read as safetensors"
    advice = "It is truncated or damaged; copy or fetch it again."
    if not whole:
        raise CheckpointError(f"{said}: its header would have {length} bytes. {advice}")
    try:
        rows = parse_json(data, "its header")
        metadata = rows.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError("__metadata__ must hold text")
        spans = {name: _span(name, row) for name, row in rows.items()}
        ends = sorted(spans.values())
        if (ends[0][0] if ends else 0) != 0 or any(a[1] != b[0] for a, b in pairwise(ends)):
            raise CheckpointError("the bytes of its tensors overlap or have gaps")
        wanted = 8 + length + (ends[-1][1] if ends else 0)
        if wanted != size:
            raise CheckpointError(f"its header describes {wanted} bytes")
    except CheckpointError as error:
        raise CheckpointError(f"{said}: {str(error).rstrip('.')}. {advice}") from error
    return {name: Entry(row["dtype"], tuple(row["shape"])) for name, row in rows.items()}, metadata


def _span(name: str, row: Any) -> tuple[int, int]:
    """Return the first byte of a tensor and the one behind its last."""
    if not isinstance(row, dict):
        raise CheckpointError(f"the entry of {name!r} is a {type(row).__name__}, expected dtype, shape and offsets")
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{name!r} has the type {dtype!r}, which safetensors does not have")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            raise CheckpointError(f"{name!r} has {what}={str(values)[:100]}, expected whole numbers")
    assert isinstance(shape, list) and isinstance(offsets, list)
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != prod(shape) * BITS[dtype]:
        raise CheckpointError(f"{name!r}, {dtype} of shape {shape}, does not fill the bytes {offsets}")
    return offsets[0], offsets[1]
