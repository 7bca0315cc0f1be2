"""The file format: one safetensors file that holds the tensors and, in its header, what rebuilds the model.

`model.safetensors` is the checkpoint; `config.json` repeats its header for people and for tools that look for it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..delta import all_finite
from ..errors import CheckpointError, MoaWarning, NumericsError, shown
from ..offload import value_of
from .atomic import replacing, said_of
from .description import check_claims, check_description
from .headers import read_header
from .json_files import parse_json, read_json
from .scratch import sweep
from .sharded import is_matrix, is_sharded, whole

FORMAT_VERSION = 2
WEIGHTS, CONFIG, DIVERGED = "model.safetensors", "config.json", "diverged"


def write(folder: Path, description: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint atomically: the new weights file replaces the old one in one step, or not at all.

    Args:
        folder: made if it does not exist; other files in it stay as they are.
        description: plain JSON values that rebuild the model.
        tensors: name -> tensor of any shape, e.g. down (E, r, i).

    Raises:
        CheckpointError: the folder is a file, or holds another kind of model, e.g. the base; or it cannot be written,
            e.g. as the disk is full.
        NumericsError: a tensor holds NaN or infinity; the folder keeps what it holds, and what diverged is put into
            its sub-folder `diverged`.
    """
    with said_of(folder):
        _check_place(folder)
    header = {"format": "moa", "format_version": FORMAT_VERSION, **description}
    data = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    for name, tensor in data.items():  # a save is the last guard of the checkpoint before it
        if tensor.is_floating_point() and not all_finite(tensor):
            _write(folder / DIVERGED, header, data)
            raise NumericsError(
                f"{name} holds NaN or infinity, so nothing was written over what {folder} holds: training diverged. Go "
                f"on from an earlier checkpoint with a lower learning rate; to look at, this one is in {DIVERGED}/."
            )
    _write(folder, header, data)


def _check_place(folder: Path) -> None:
    """Check that a folder holds no other model: its files would be lost."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"cannot save to {folder}: it is a file. Name a folder.")
    kind = read_json(folder / CONFIG).get("model_type") if (folder / CONFIG).is_file() else None
    if kind not in (None, "moa"):
        raise CheckpointError(
            f"cannot save to {folder}: it holds a model of type {kind!r}, which would be replaced. Name another folder."
        )
    weights = folder / WEIGHTS
    if kind is None and weights.is_file():
        try:
            with safe_open(weights, "pt") as opened:
                ours = "moa" in (opened.metadata() or {})
        except SafetensorError:
            ours = False
        if not ours:
            raise CheckpointError(
                f"cannot save to {folder}: moa did not write its {WEIGHTS}, which would be replaced. Name "
                "another folder."
            )


def _write(folder: Path, header: Mapping[str, Any], data: dict[str, Tensor]) -> None:
    with replacing(folder / WEIGHTS) as temporary:
        save_file(data, temporary, metadata={"format": "pt", "moa": json.dumps(header)})
    with replacing(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps({"model_type": "moa", **header}, indent=2) + "\n", encoding="utf-8")


def locate(path: str | Path) -> Path:
    """Return the folder of a checkpoint: the path itself, or the local copy of a hub id.

    Raises:
        CheckpointError: neither exists.
    """
    folder = Path(path)
    if not folder.exists():
        with suppress(OSError):
            sweep(folder.absolute())  # a killed process may have set it aside
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{path} is a file: name the folder that holds {WEIGHTS}.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=[WEIGHTS, CONFIG, "adapter_*", "*/adapter_*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"no folder {path!s}, and the hub does not give it either: {error}") from error


def of_run(path: str | Path) -> Path:
    """Return the folder of a checkpoint (tensors of any shape): the path itself, or its model/ where it is a run."""
    inner = Path(path) / "model"
    return inner if (inner / WEIGHTS).is_file() else Path(path)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a checkpoint holds: its description and its tensors on the CPU, name -> tensor of any shape.

    Raises:
        CheckpointError: no such file, a truncated one, one that moa did not write, or another version of the format.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} has no {WEIGHTS} (it holds {there}): name the folder save_pretrained wrote.")
    try:
        _, metadata = read_header(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    header = metadata.get("moa")
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is truncated or not a safetensors file: {error}") from error
    if header is None:
        raise CheckpointError(f"{file} was not written by moa: its header has no 'moa' entry.")
    description = parse_json(header, f"{file}: the description in its header")
    version = description.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{file} has format_version {shown(repr(version))}: expected a whole number.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version}, this moa reads up to {FORMAT_VERSION}: upgrade moa."
        )
    if version < FORMAT_VERSION:
        raise CheckpointError(f"{file} has format version {version}, of moa before its release: train it anew.")
    return description, tensors


def read_mixture(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `read` does, of a checkpoint whose description says what rebuilds a model.

    Raises:
        CheckpointError: as `read`; a field of another type; sizes that the file's tensors cannot have.
    """
    description, tensors = read(folder)
    file = folder / WEIGHTS
    check_description(description, file)
    check_claims(description, tensors, file)
    return description, tensors


def fill(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy a checkpoint's tensors into a model's own, which must agree in name and shape.

    Args:
        own: name -> tensor of the model, of any shape, changed in place.
        tensors: name -> tensor of the checkpoint.
        folder: named in the error.

    Raises:
        CheckpointError: missing, unexpected, mis-shaped or mis-typed tensors, all in one message, grouped by kind.
        NumericsError: a tensor holds NaN or infinity.
    """
    problems = []
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name}: {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    kinds = [
        f"{name}: {tensors[name].dtype} in the file, {own[name].dtype} in the model"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].is_floating_point() != tensors[name].is_floating_point()
    ]
    for kind, rows in (
        ("of another type", kinds),
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", shapes),
    ):
        if rows:
            shown = "; ".join(rows[:5]) + (f"; and {len(rows) - 5} more" if len(rows) > 5 else "")
            problems.append(f"{len(rows)} {kind}: {shown}")
    if problems:
        raise CheckpointError(f"{folder} does not fit this model. Tensors " + ". Tensors ".join(problems) + ".")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NumericsError(f"{name} in {folder} holds NaN or infinity: this checkpoint is not usable.")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def original_name(name: str) -> str:
    """Return a base tensor's name as it was before mixtures went in: "q.base.weight" -> "q.weight"."""
    return ".".join(part for part in name.split(".") if part != "base")


def fingerprint(
    base: nn.Module,
    saved_whole: Iterable[str] = (),
    n_tensors: int = 8,
    n_values: int = 4,
    gathered: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Return a few values of a few tensors that a checkpoint does not hold, by which another base is recognised.

    A base whose own weights are trained, too, is recognised as it is when saved: they are not in the checkpoint. Values
    are those of whole tensors: of a sharded base every process must ask, unless they are gathered already.

    Args:
        base: with or without mixtures inside.
        saved_whole: names of its modules that the checkpoint holds.
        n_tensors: how many floating tensors of at least two axes, (o, i), to look at, spread evenly over the model.
        n_values: how many of their values to keep, spread evenly over the flattened matrix.
        gathered: name -> whole tensor of the base, where one process asks alone; a shard that it lacks is left out.
    """
    held = _held(base, saved_whole)
    found = {
        name: tensor if gathered is None else gathered.get(name, tensor)
        for name, tensor in base.named_parameters()
        if ".branches." not in name and id(tensor) not in held
    }
    own = {
        original_name(name): tensor
        for name, tensor in found.items()
        if is_matrix(tensor) and tensor.numel() and (gathered is None or not is_sharded(tensor))
    }
    at_home = {original_name(name): name for name in found}
    names = sorted(own)
    chosen = [names[i * len(names) // n_tensors] for i in range(min(n_tensors, len(names)))] if names else []
    if len(names) <= n_tensors:
        chosen = names
    probes = {}
    for name in chosen:
        values = whole(value_of(base, at_home[name], own[name])).detach()
        probes[name] = {"shape": list(values.shape), "values": some_values(values, n_values)}
    return probes


def some_values(tensor: Tensor, n: int) -> list[float]:
    """Return n values of a tensor of any shape that is not empty, at places spread over all of it."""
    flat = tensor.detach().reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, n, dtype=torch.float64).long()
    return flat[at.to(flat.device)].float().tolist()  # type: ignore[no-any-return]


def _held(base: nn.Module, saved_whole: Iterable[str]) -> set[int]:
    """Return the ids of the base's parameters that a checkpoint holds: a tied one has the name of another module."""
    return {id(parameter) for name in saved_whole for parameter in base.get_submodule(name).parameters()}


def check_fingerprint(
    stored: Mapping[str, Any],
    base: nn.Module,
    folder: Path | str,
    as_made: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Check that a base is the one a checkpoint was made on, up to the precision of its dtype.

    Args:
        stored: the checkpoint's "base" entry.
        base: without mixtures, its matrices (o, i).
        folder: named in the error.
        as_made: what the checkpoint's base had of a matrix of this one, by its name.

    Raises:
        CheckpointError: a matrix is missing, of another shape or of other values.
    """
    at_home = {original_name(n): n for n, _ in base.named_parameters()}
    own = {original_name(n): p for n, p in base.named_parameters()}
    if not stored["fingerprint"]:
        warnings.warn(
            f"{folder} says nothing by which its base is recognised (it was made on a {stored['class']} without dense "
            "weights): whether this is the right one was not checked.",
            MoaWarning,
            stacklevel=3,
        )
    for name, probe in stored["fingerprint"].items():
        tensor = own.get(name)
        was = f"{folder} was made on {stored['class']} {stored['name_or_path']!r}"
        if tensor is None:
            raise CheckpointError(f"wrong base: {was}, which has a matrix {name}; {type(base).__name__} has none.")
        if not is_matrix(tensor):  # a quantised base holds codes, which cannot be compared
            continue
        held = as_made(name, whole(value_of(base, at_home[name], tensor)).detach())
        if list(held.shape) != probe["shape"]:
            raise CheckpointError(
                f"wrong base: {was}, where {name} is {tuple(probe['shape'])}; here it is {tuple(held.shape)}."
            )
        flat = held.reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, len(probe["values"]), dtype=torch.float64).long()
        values = flat[at.to(flat.device)].float().cpu()
        if not torch.allclose(values, torch.tensor(probe["values"], dtype=torch.float32), rtol=1e-2, atol=1e-5):
            raise CheckpointError(
                f"wrong base: {was}; the values of {name} differ from this {type(base).__name__}'s. Load the right "
                "base, or pass check_base=False to use this one on purpose."
            )


def warn_of_unsaved(base: nn.Module, saved_whole: Iterable[str]) -> None:
    """Warn if weights of a base, (o, i), are trained that a checkpoint does not hold.

    Args:
        base: with mixtures inside.
        saved_whole: names of its modules that the checkpoint holds.
    """
    held = _held(base, saved_whole)
    lost = [
        name
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and ".branches." not in name and id(parameter) not in held
    ]
    if lost:
        warnings.warn(
            f"{len(lost)} parameters of the base are trained and are not in this checkpoint ({lost[0]}, …): save the "
            "base as well, or name the modules in modules_to_save.",
            MoaWarning,
            stacklevel=4,
        )


def plain_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with only JSON values; what JSON cannot hold becomes its text."""
    return json.loads(json.dumps(dict(values), default=str))  # type: ignore[no-any-return]
