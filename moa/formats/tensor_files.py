"""Safetensors checkpoints read one tensor at a time, single file or sharded, and their differences.

Format: the safetensors specification (8-byte header length, JSON header, data), Hugging Face's index file of shards.
Differences of weights: task arithmetic (Ilharco et al. 2022, arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..delta import Delta, Dense, work_dtype
from ..errors import CheckpointError, ConfigError, ShapeError, shown
from .headers import read_header
from .json_files import read_json
from .named_deltas import Deltas, listed

# Names of the types in a safetensors header.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# A memory map keeps every page it has read in the process's resident set: it is opened anew after this many bytes.
REMAP_BYTES = 64 * 2**20


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a model folder or a .safetensors file, each read when it is asked for.

    Args:
        path: a folder holding model.safetensors (or any single .safetensors file, or an index and its shards), or
            one .safetensors file.

    Raises:
        CheckpointError: nothing to read there, a shard is missing, truncated or damaged, or the index names a tensor
            that its shard does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.shards, index = _shards(self.path)
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.files: dict[str, Path] = {}
        for shard in self.shards:
            self._read_header(shard)
        if index is not None:
            lost = [name for name, file in index.items() if self.files.get(name) != self.path / file]
            if lost:
                raise CheckpointError(
                    f"the index of {self.path} names tensors that their shards do not hold: {listed(lost)}. The "
                    "checkpoint is incomplete or its shards were renamed; fetch it again."
                )
        self._open: tuple[Path, Any, int] | None = None

    def _read_header(self, shard: Path) -> None:
        entries, _ = read_header(shard)
        for name, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise CheckpointError(
                    f"{name!r} in {shard} has the type {entry.dtype}, which moa does not read. "
                    f"Known: {', '.join(DTYPES)}."
                )
            if name in self.files:
                raise CheckpointError(f"{name!r} is in two files, {self.files[name]} and {shard}.")
            self.files[name] = shard
            self.dtypes[name] = DTYPES[entry.dtype]
            self.shapes[name] = torch.Size(entry.shape)

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        size = self.shapes[name].numel() * self.dtypes[name].itemsize
        if self._open is None or self._open[0] != file or self._open[2] > REMAP_BYTES:
            self._open = None
            self._open = (file, safe_open(file, framework="pt"), 0)
        file, handle, read = self._open
        self._open = (file, handle, read + size)
        return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors in {len(self.shards)} files)"


def _shards(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of a checkpoint and, where there is an index, its name -> file map."""
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: expected a model folder or a .safetensors file.")
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise CheckpointError(f"{path} has several indices ({listed(i.name for i in indices)}): name one file.")
    if indices:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{indices[0]} has no weight_map: it is not a safetensors index.")
        for name, file in weight_map.items():
            _check_inside(path, file, f"{indices[0]} says that {name!r} is in")
        return [path / file for file in sorted(set(weight_map.values()))], weight_map
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files, None
    if files:
        raise CheckpointError(
            f"{path} holds {len(files)} safetensors files and no index ({listed(f.name for f in files)}): it is an "
            "incomplete sharded checkpoint, or name one file."
        )
    pickles = listed(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in sorted(path.glob(pattern)))
    raise CheckpointError(
        f"{path} holds no safetensors file (pickled weights there: {pickles}). moa reads no pickle: save the model "
        "again with save_pretrained."
    )


def _check_inside(folder: Path, file: object, who: str) -> None:
    """Check that a name which a file gives is one of a file in the folder."""
    name = PurePath(file) if isinstance(file, str) and "\0" not in file else PurePath()
    if not name.parts:
        raise CheckpointError(f"{who} {shown(repr(file))}: expected the name of a file.")
    if name.is_absolute() or ".." in name.parts or "\\" in str(file):
        raise CheckpointError(
            f"{who} {shown(repr(file))}, outside the checkpoint's folder: it was changed by hand, or is not to "
            "be trusted."
        )
    try:
        there = (folder / name).is_file()
    except OSError:  # a name that no file system takes
        there = False
    if not there:
        raise CheckpointError(f"{who} {shown(repr(file))}, which is missing, though the checkpoint's index names it.")


def difference(
    tuned: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    *,
    source: str = "tuned",
    base_name: str | None = None,
    ignore: Sequence[str] = (),
) -> Deltas:
    """Return ΔW = tuned - base for every floating tensor of two state dicts or checkpoints, made when read.

    Args:
        tuned: name -> weight (o, i) or any shape.
        base: the same names and shapes.
        source: name of the tuned model, used in errors.
        base_name: id or folder of the base; None when unknown.
        ignore: names left out, e.g. a head that only one side has.

    Returns:
        Lazy dense deltas in the work type. Integer and bool tensors must be equal on both sides and are left out.

    Raises:
        ShapeError: a tensor has another shape on the other side, or an integer tensor differs.
        ConfigError: the two hold different names.
    """
    names = [name for name in base if name not in ignore]
    only_base = [name for name in names if name not in tuned]
    only_tuned = [name for name in tuned if name not in base and name not in ignore]
    if only_base or only_tuned:
        raise ConfigError(
            f"{source} and its base hold different tensors: only in the base {listed(only_base)}; only in "
            f"{source} {listed(only_tuned)}. Is it another model? List them in ignore= to leave them out."
        )

    def load(name: str) -> Delta:
        new, old = tuned[name], base[name]
        if new.shape != old.shape:
            raise ShapeError(
                f"{name!r} is {tuple(new.shape)} in {source} and {tuple(old.shape)} in the base: they are not the "
                "same model, or its vocabulary was resized."
            )
        dtype = work_dtype(torch.promote_types(new.dtype, old.dtype))
        return Dense(new.to(dtype) - old.to(dtype))

    floating = []
    for name in names:
        if dtype_of(base, name).is_floating_point:
            floating.append(name)
        elif not torch.equal(tuned[name], base[name]):
            raise ShapeError(
                f"the integer tensor {name!r} differs between {source} and its base, and a difference of integers "
                "has no meaning here (a quantised checkpoint?): dequantise both, or list it in ignore=."
            )
    return Deltas(floating, load, source, base_name)


def dtype_of(tensors: Mapping[str, Tensor], name: str) -> torch.dtype:
    """Return the dtype of one (any shape) tensor, from the file's header where the mapping knows it."""
    known = getattr(tensors, "dtypes", None)
    return known[name] if known is not None else tensors[name].dtype


def read_difference(tuned: str | Path, base: str | Path, *, ignore: Sequence[str] = ()) -> Deltas:
    """Return ΔW = tuned - base of two checkpoints, streamed: each tensor is read when it is asked for.

    Args:
        tuned: folder or file of the fine-tuned model, single or sharded safetensors.
        base: the model it was tuned from; the two may be sharded differently.
        ignore: names left out, e.g. a head that only one side holds.

    Returns:
        Lazy dense deltas (o, i) in the work type; memory holds the tensor asked for, nothing else.

    Raises:
        CheckpointError: a file is missing, truncated or damaged.
        ShapeError: shapes differ, or an integer tensor differs.
        ConfigError: the two hold different names.
    """
    return difference(
        Checkpoint(tuned),
        Checkpoint(base),
        source=str(tuned),
        base_name=str(Path(base).resolve()),
        ignore=ignore,
    )
