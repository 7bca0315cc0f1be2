"""What is in a checkpoint, as text, from its file only: the base is not loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, plain_text
from ..formats import checkpoint
from ..kernels import choose_engine, engines
from ..model.pruned import kept_of


def describe_checkpoint(path: str | Path, n_rows: int = 1024, dtype: str = "float32", device: str = "cpu") -> str:
    """Return the format, base, recipes and layers of a checkpoint, and the engine that each layer would run.

    Args:
        path: folder of the checkpoint.
        n_rows: rows (tokens) per forward that the engines are chosen for.
        dtype: of the activations.
        device: where they would run.

    Raises:
        ConfigError: no such dtype or device, or less than one row.
        CheckpointError: no checkpoint there.
    """
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"dtype {dtype!r} is not a torch dtype: use float32, bfloat16 or float16.")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: {error}") from error
    if n_rows < 1:
        raise ConfigError(f"--tokens must be at least 1, got {n_rows}.")
    folder = checkpoint.locate(path)
    description, tensors = checkpoint.read_mixture(folder)
    base = description["base"]
    size = (folder / checkpoint.WEIGHTS).stat().st_size
    lines = [
        f"{folder}: moa format {description['format_version']}, {len(tensors)} tensors, {size / 1e6:.2f} MB",
        f"base: {base['class']} from {base['name_or_path'] or 'memory'}"
        + (f", {base['config']['dtype']}" if (base["config"] or {}).get("dtype") else "")
        + (", pruned" if kept_of(base["config"] or {}) else ""),
    ]
    heads = description["modules_to_save"]
    if heads:
        numbers = [t.numel() for n, t in tensors.items() if any(n.startswith(f"base.{h}.") for h in heads)]
        lines.append(f"trained whole: {', '.join(heads)} ({sum(numbers):,} parameters)")
    for recipe in description["recipes"]:
        options = {key: value for key, value in recipe.items() if key not in ("router", "sites")}
        lines += ["", f"recipe {recipe['router']}: {json.dumps(options)}"]
        lines += _layer_lines(recipe, tensors, n_rows, kind, device)
    lines += ["", f"engines for {n_rows} rows of {dtype} on {device}; on this machine:"]
    lines += [f"  {name}: {reason or 'can run'}" for name, reason in engines().items()]
    return "\n".join(map(plain_text, lines))  # names in a file are of whoever wrote it


def _layer_lines(
    recipe: Mapping[str, Any], tensors: Mapping[str, Tensor], n_rows: int, dtype: torch.dtype, device: str
) -> list[str]:
    width = max([len("layer"), *map(len, recipe["sites"])])
    k = recipe.get("k", recipe["n_experts"])  # a recipe without it runs every expert
    lines = [f"  {'layer':<{width}}  {'experts':>10}  {'router':>8}  engine  tensors"]
    for layer in recipe["sites"]:
        own = {
            n.removeprefix(f"base.{layer}."): t for n, t in tensors.items() if n.startswith(f"base.{layer}.branches.")
        }
        banks = {n: t for n, t in own.items() if ".bank." in n}
        routers = sum(t.numel() for n, t in own.items() if ".router." in n)
        shapes = ", ".join(f"{n.rpartition('.')[2]} {tuple(t.shape)}" for n, t in own.items())
        engine = recipe.get("engine") or _engine(banks, k, n_rows, dtype, device)
        experts = sum(t.numel() for t in banks.values())
        lines.append(f"  {layer:<{width}}  {experts:>10,}  {routers:>8,}  {engine:<6}  {shapes}")
    return lines


def _engine(banks: Mapping[str, Tensor], k: int, n_rows: int, dtype: torch.dtype, device: str) -> str:
    """Return the engine of a bank with down (E, r, i) and up (E, r, o); "-" for a family that has no engines."""
    by_name = {name.rpartition(".")[2]: tensor for name, tensor in banks.items()}
    if set(by_name) != {"down", "up"} or any(t.ndim != 3 for t in by_name.values()):
        return "-"
    n_experts, rank, d_in = by_name["down"].shape
    return choose_engine(n_rows, d_in, by_name["up"].shape[2], n_experts, rank, k, dtype, device)
