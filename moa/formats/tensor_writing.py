"""Safetensors files written tensor by tensor, and the other files of a checkpoint copied beside them.

Format: the safetensors specification (8-byte little-endian header length, JSON header, tensor bytes in order).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError
from .tensor_files import DTYPES, Checkpoint

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Weights in any format: never copied beside merged ones, where a loader could prefer them.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
)


def write_safetensors(
    file: Path,
    specs: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a safetensors file from tensors that arrive one by one: memory holds one of them.

    Args:
        file: the file to write.
        specs: name -> (type, shape), in the order of `file_order`.
        tensors: (name, tensor of that type and shape), in the same order.
        metadata: strings for the header.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: a tensor arrives out of order, or with another type or shape than announced.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": TYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(specs.items())
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            wanted = next(expected, None)
            if wanted is None or wanted[0] != name or wanted[1] != (tensor.dtype, tuple(tensor.shape)):
                raise CheckpointError(
                    f"writing {file.name}: {name!r} came as {tensor.dtype} {tuple(tensor.shape)}, expected {wanted}."
                )
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            handle.write(flat.view(torch.uint8).numpy().data)
        if (left := next(expected, None)) is not None:
            raise CheckpointError(f"writing {file.name}: the tensors ended before {left[0]!r}.")
        handle.flush()
        os.fsync(handle.fileno())
    return 8 + len(text) + offset


def file_order(names: Iterable[str], dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Return the names with wide types first, else as they come: every tensor is then aligned in its file."""
    return sorted(names, key=lambda name: -dtypes[name].itemsize)


def plan_shards(checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], most_bytes: int) -> list[list[str]]:
    """Return the names of each output file, filled in order up to a size; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in checkpoint:
        size = checkpoint.shapes[name].numel() * dtypes[name].itemsize
        if shards[-1] and used + size > most_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return [file_order(shard, dtypes) for shard in shards]


def copy_rest(folder: Path, partial: Path) -> None:
    """Copy every file that holds no weights (no tensors of any shape), in sub-folders too; hidden ones are left.

    Raises:
        CheckpointError: a link that leads out of the folder, e.g. to somebody's key: the copy would carry its content.
    """
    for source in sorted(folder.rglob("*")):
        inside = source.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or source.name.endswith(WEIGHT_SUFFIXES):
            continue
        if source.is_file():
            _check_link(source, folder)
            (partial / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / inside)


def _check_link(file: Path, folder: Path) -> None:
    """Check that a file lies in its folder, or where the Hub's cache keeps the files that its folders link to."""
    place = file.resolve()
    roots = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    if not any(root in place.parents for root in roots):
        raise CheckpointError(f"{file} is a link to {place}, outside {folder}: put the file itself there.")
