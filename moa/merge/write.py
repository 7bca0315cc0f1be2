"""The ways out of a merge: a full checkpoint with the base's other files, or a PEFT LoRA folder.

File layouts: Hugging Face transformers (sharded safetensors with an index) and PEFT 0.21 (LoRA).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..delta import Delta, LowRank
from ..errors import CheckpointError, ConfigError, ShapeError
from ..formats.atomic import staged
from ..formats.card import model_card, peft_version
from ..formats.json_files import read_json
from ..formats.named_deltas import DeltaLike, as_delta, check_finite, listed
from ..formats.peft_folder import PREFIX
from ..formats.tensor_files import Checkpoint
from ..formats.tensor_writing import TYPE_NAMES, copy_rest, plan_shards, write_safetensors
from .compose import Squeezed, squeeze


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        path: the folder.
        files: its weight files.
        nbytes: bytes of the weight files.
        changed: tensors that differ from the base's, or adapted modules.
        errors: name -> relative error ‖ΔW - written‖ / ‖ΔW‖ of what was squeezed; empty if nothing was.
    """

    path: Path
    files: tuple[str, ...]
    nbytes: int
    changed: int
    errors: Mapping[str, float] = field(default_factory=dict)


def write_checkpoint(
    base: str | Path,
    deltas: Mapping[str, DeltaLike],
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: bool = False,
) -> Written:
    """Write W + ΔW for every tensor of a base checkpoint, with the base's other files, so that it loads like the base.

    Tensors stream: each base weight is read, changed and written before the next. Those without a delta are copied bit
    for bit (unless `dtype` is given). The sum is taken in float32, or float64 if either is, and rounded once.

    Args:
        base: the base model's folder; its config, tokenizer and every other file that holds no weights are copied.
        deltas: name -> ΔW (o, i); lazy ones (`merge_lazily`) are made as they are written.
        out: the folder to make.
        dtype: floating type to store; each tensor's own if None.
        max_shard_bytes: size above which a new file begins.
        overwrite: replace `out` if it holds a checkpoint.
        progress: show a bar.

    Returns:
        `Written`.

    Raises:
        CheckpointError: the base cannot be read, is quantised, lacks a tensor that has a delta, or `out` exists.
        ShapeError: a delta does not fit its weight.
        NumericsError: a delta has NaN or infinity.
        ConfigError: `out` is the base or lies in it, or the type or size cannot be used.
    """
    folder = Path(base)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: the base must be one, with its config and tokenizer.")
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes is {max_shard_bytes}, expected at least 1.")
    if dtype is not None and (not dtype.is_floating_point or dtype not in TYPE_NAMES):
        raise ConfigError(f"dtype is {dtype}, expected a floating type that safetensors holds.")
    weights = Checkpoint(folder)
    check_targets(weights, deltas, folder)
    types = {
        name: dtype if dtype is not None and own.is_floating_point else own for name, own in weights.dtypes.items()
    }
    inputs = [folder, *(s for s in [getattr(deltas, "source", "")] if s and Path(s).exists())]
    with staged(out, overwrite=overwrite, inputs=inputs) as partial:
        copy_rest(folder, partial)
        shards = plan_shards(weights, types, max_shard_bytes)
        bar = tqdm(total=len(weights), desc="write", disable=not progress)
        files: dict[str, list[str]] = {}
        nbytes = 0
        for position, names in enumerate(shards, start=1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{position:05d}-of-{len(shards):05d}.safetensors"
            specs = {name: (types[name], tuple(weights.shapes[name])) for name in names}

            def stream(names: list[str] = names) -> Iterator[tuple[str, Tensor]]:
                for name in names:
                    yield name, _changed(weights[name], deltas, name).to(types[name])
                    bar.update()

            nbytes += write_safetensors(partial / file, specs, stream())
            files[file] = names
        bar.close()
        if len(shards) > 1:
            _write_index(partial, files, sum(s.numel() * types[n].itemsize for n, s in weights.shapes.items()))
        if dtype is not None and (partial / "config.json").exists():
            _set_dtype(partial / "config.json", dtype)
    return Written(Path(out), tuple(files), nbytes, len(deltas))


def check_targets(weights: Checkpoint, names: Collection[str], folder: Path) -> None:
    """Check that a base checkpoint holds every weight (o, i) that is to change, as plain floats.

    Raises:
        CheckpointError: one is not there, or the base is quantised.
    """
    lost = [name for name in names if name not in weights]
    if lost:
        raise CheckpointError(
            f"the base {folder} holds no {listed(lost)}, which a delta changes: the adapter is for another base, or "
            "that weight is tied to another and not stored."
        )
    config = folder / "config.json"
    if config.exists() and read_json(config).get("quantization_config"):
        raise CheckpointError(
            f"the base {folder} is quantised (quantization_config in its config.json): a delta cannot be added to its "
            "codes; merge into the unquantised base."
        )
    packed = [name for name in names if not weights.dtypes[name].is_floating_point]
    if packed:
        raise CheckpointError(f"the base {folder} stores {listed(packed)} as integers; merge into a float base.")


def _changed(weight: Tensor, deltas: Mapping[str, DeltaLike], name: str) -> Tensor:
    """Return W + ΔW (o, i), or W itself where there is no delta."""
    if name not in deltas:
        return weight
    delta = check_finite(as_delta(deltas[name], name), name, getattr(deltas, "source", "the given deltas"))
    if delta.shape != weight.shape:
        raise ShapeError(
            f"the delta of {name!r} is {tuple(delta.shape)}, the base's weight {tuple(weight.shape)}: it was trained "
            "on another base model."
        )
    dtype = torch.promote_types(delta.dtype, weight.dtype)
    wide = weight.to(dtype)
    if isinstance(delta, LowRank):
        return torch.addmm(wide, delta.up.to(dtype), delta.down.to(dtype))
    return wide + delta.dense().to(dtype)


def _write_index(partial: Path, files: Mapping[str, list[str]], total: int) -> None:
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    write_json(partial / "model.safetensors.index.json", index)


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    value = read_json(config)
    name = str(dtype).removeprefix("torch.")
    for key in [k for k in ("dtype", "torch_dtype") if k in value] or ["dtype"]:
        value[key] = name
    write_json(config, value)


def write_json(file: Path, value: object) -> None:
    """Write an object as indented JSON; no tensors, so no shapes."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_peft(
    deltas: Mapping[str, DeltaLike],
    out: str | Path,
    *,
    base_model: str | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    task_type: str | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Written:
    """Write low-rank deltas as a PEFT LoRA folder with scale 1 (alpha = r in every module) and a model card.

    target_modules lists full module paths. PEFT takes each as the end of a path, so a base that holds the same path
    again under another name gets an idle zero adapter there, and PEFT warns of missing keys.

    Args:
        deltas: name ("….weight") -> down (r, i), up (o, r); dense ones need `rank`. Those that are `transposed` are
            written with fan_in_fan_out.
        out: the folder to make.
        base_model: id or folder of the base; taken from the deltas if they know it and None is given.
        rank: squeeze every module to at most this rank, the nearest in Frobenius norm; the errors are returned.
        dtype: floating type to store.
        task_type: PEFT's, e.g. "CAUSAL_LM"; None writes none.
        overwrite: replace `out` if it holds a checkpoint.
        progress: show a bar.

    Returns:
        `Written`, with the relative error of every module that was squeezed.

    Raises:
        ConfigError: a dense delta and no rank, a name that is not a weight, nothing to write, or an unusable type.
        ShapeError: a delta that is not a matrix.
        NumericsError: a delta has NaN or infinity, also after rounding to `dtype`.
        CheckpointError: `out` exists.
    """
    if not deltas:
        raise ConfigError("write_peft: there are no deltas to write.")
    if not dtype.is_floating_point or dtype not in TYPE_NAMES:
        raise ConfigError(f"write_peft: dtype is {dtype}, expected a floating type that safetensors holds.")
    source = getattr(deltas, "source", "the given deltas")
    base = base_model if base_model is not None else getattr(deltas, "base", None)
    transposed = bool(getattr(deltas, "transposed", False))
    inputs = [s for s in [source] if Path(s).exists()]
    with staged(out, overwrite=overwrite, inputs=inputs) as partial:
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        errors: dict[str, float] = {}
        for name in tqdm(deltas, desc="write", disable=not progress):
            module = name.removesuffix(".weight")
            if module == name:
                raise ConfigError(f"write_peft: {name!r} is no linear layer's weight; LoRA cannot hold its change.")
            delta = check_finite(as_delta(deltas[name], name), name, source)
            small, squeezed = _at_rank(delta, name, rank)
            if squeezed is not None:
                errors[name] = squeezed.relative
            rounded = LowRank(small.down.to(dtype), small.up.to(dtype))
            check_finite(rounded, name, f"{source} rounded to {dtype}")
            down, up = (rounded.up.T, rounded.down.T) if transposed else (rounded.down, rounded.up)
            tensors[f"{PREFIX}{module}.lora_A.weight"] = down.contiguous()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = up.contiguous()
            ranks[module] = rounded.rank
        specs = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
        nbytes = write_safetensors(partial / "adapter_model.safetensors", specs, tensors.items())
        write_json(partial / "adapter_config.json", _peft_config(ranks, base, task_type, transposed))
        what = f"A low-rank change of {len(ranks)} linear layers, made by moa ({Path(source).name})."
        (partial / "README.md").write_text(model_card(base, what, task_type), encoding="utf-8")
    return Written(Path(out), ("adapter_model.safetensors",), nbytes, len(ranks), errors)


def _at_rank(delta: Delta, name: str, rank: int | None) -> tuple[LowRank, Squeezed | None]:
    if len(delta.shape) != 2:
        raise ShapeError(f"write_peft: {name!r} has shape {tuple(delta.shape)}; LoRA holds changes of matrices only.")
    if isinstance(delta, LowRank) and (rank is None or delta.rank <= rank):
        if delta.rank:
            return delta, None
        # LoRA has no rank 0: no change is one zero column.
        o, i = delta.shape
        return LowRank(delta.down.new_zeros(1, i), delta.up.new_zeros(o, 1)), None
    if rank is None:
        raise ConfigError(
            f"write_peft: the merged change of {name!r} is dense (its method leaves no factors): pass rank= to write "
            "its nearest low-rank one, or write_checkpoint to keep it whole."
        )
    squeezed = squeeze(delta, rank)
    small, _ = _at_rank(squeezed.delta, name, None)
    return small, squeezed


def _peft_config(
    ranks: Mapping[str, int], base: str | None, task_type: str | None, transposed: bool
) -> dict[str, object]:
    most = max(ranks.values())
    # "^" and escapes: PEFT reads the keys as regular expressions for the end of a module's path.
    other = {f"^{re.escape(module)}": r for module, r in ranks.items() if r != most}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "revision": None,
        "auto_mapping": None,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        **({"peft_version": number} if (number := peft_version()) else {}),
    }
