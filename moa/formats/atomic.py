"""Folders that appear whole or not at all, and safetensors files written tensor by tensor.

Format: the safetensors specification (8-byte little-endian header length, JSON header, tensor bytes in order).
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .tensor_files import DTYPES, Checkpoint, read_json

TYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What a folder must hold for overwrite=True to replace it, and a key of it that only a model's or an adapter's has:
# never someone's home folder or project by a slip of the keyboard.
MARKS = ("config.json", "adapter_config.json")
MARK_KEYS = ("model_type", "architectures", "peft_type", "transformers_version")

# A checkpoint's files beside its weights: replaced with it. What is none of them is somebody's, and stays.
REST = (
    *MARKS,
    "generation_config.json",
    "*token*.json",
    "*processor_config.json",
    "preprocessor_config.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "README.md",
)

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


@contextmanager
def staged(out: str | Path, *, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> Iterator[Path]:
    """Give a new folder beside `out` to write into, and rename it to `out` when the block ends without an error.

    Files of a replaced `out` that do not belong to a checkpoint are copied, unless the new one has that name, too.
    Until then `out` is untouched. A block that raises leaves nothing behind; a killed process leaves a hidden folder
    ending in ".partial", never a half-written `out`. When `out` is replaced, the old folder is moved aside, the new one
    moved in, and the old one deleted last: a kill between the two moves leaves the old one whole beside `out`,
    ending in ".replaced".

    Args:
        out: the folder to make; its parent is made if it is missing.
        overwrite: allow replacing a folder that holds a checkpoint or is empty.
        inputs: files and folders the block reads: `out` may not be, hold, or lie in one of them.

    Yields:
        The folder to write into.

    Raises:
        CheckpointError: `out` exists and overwrite is False, or it holds no checkpoint to replace.
        ConfigError: `out` is one of the inputs, or lies in or around one.
    """
    target = check_target(out, overwrite=overwrite, inputs=inputs)
    target.parent.mkdir(parents=True, exist_ok=True)
    tag = f".{target.name}.{uuid.uuid4().hex[:12]}"
    partial, replaced = target.with_name(f"{tag}.partial"), target.with_name(f"{tag}.replaced")
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        if target.exists():
            _keep_foreign(target, partial)
            os.rename(target, replaced)
            try:
                os.rename(partial, target)
            except OSError:
                os.rename(replaced, target)
                raise
        else:
            os.rename(partial, target)
        _sync(target.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    if replaced.exists():
        shutil.rmtree(replaced)


def check_target(out: str | Path, *, overwrite: bool = False, inputs: Sequence[str | Path] = ()) -> Path:
    """Return the absolute path of an output folder that may be written, by the rules of `staged`; no tensors.

    Raises:
        CheckpointError: `out` exists and overwrite is False, or it holds no checkpoint to replace.
        ConfigError: `out` is one of the inputs, or lies in or around one.
    """
    target = Path(out).absolute()
    for source in inputs:
        read, written = Path(source).resolve(), target.resolve()
        if read == written or read in written.parents or written in read.parents:
            raise ConfigError(f"the output {target} and the input {source} are the same or one holds the other.")
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise CheckpointError(
                f"{target} exists already: choose another output folder, or pass overwrite=True to replace it."
            )
        if target.is_symlink() or not target.is_dir() or not _replaceable(target):
            raise CheckpointError(
                f"{target} is no folder with a checkpoint (a model's {' or '.join(MARKS)} in it), so overwrite=True "
                "does not replace it: remove it yourself or choose another output folder."
            )
    return target


def _replaceable(folder: Path) -> bool:
    return not any(folder.iterdir()) or any(_is_mark(folder / mark) for mark in MARKS)


def _is_mark(file: Path) -> bool:
    """Tell whether a JSON file describes a model or an adapter; many programs have a config.json."""
    try:
        return any(key in read_json(file) for key in MARK_KEYS)
    except CheckpointError:
        return False


def _keep_foreign(old: Path, new: Path) -> None:
    """Copy what does not belong to a checkpoint from an old folder into a new one that does not have it."""
    for source in sorted(old.rglob("*")):
        inside = source.relative_to(old)
        own = source.name.endswith(WEIGHT_SUFFIXES) or any(fnmatch(source.name, pattern) for pattern in REST)
        if (own and len(inside.parts) == 1) or (new / inside).exists() or (source.is_dir() and not source.is_symlink()):
            continue
        (new / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, new / inside, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """Ask the system to put a folder's entries on disk, where it can (not on Windows)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


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
    """Copy every file that holds no weights (no tensors of any shape), in sub-folders too; hidden ones are left."""
    for source in sorted(folder.rglob("*")):
        inside = source.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts) or source.name.endswith(WEIGHT_SUFFIXES):
            continue
        if source.is_file():
            (partial / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / inside)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside target; on success flush it to disk and rename it onto target, else remove it.

    The file has the permissions that the process's umask leaves to a new one.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    temporary.touch(exist_ok=False)
    allowed = temporary.stat().st_mode
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, allowed)  # whoever wrote it may have made a new file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
