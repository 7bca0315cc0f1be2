"""A PEFT LoRA folder read as deltas: what it means is honoured, or refused by name.

LoRA (Hu et al. 2021, arXiv 2106.09685), rsLoRA's scale (Kalajdzievski 2023, arXiv 2312.03732); layout of PEFT 0.21.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..delta import Delta, LowRank, low_rank
from ..errors import CheckpointError, ShapeError
from .named_deltas import Deltas, listed
from .tensor_files import Checkpoint, read_json

PREFIX = "base_model.model."

# Settings under which a folder is not "base weight + scale · up · down", with the reason shown to the user.
REFUSED: dict[str, str] = {
    "use_dora": "DoRA rescales the whole weight, so its change depends on the base and is no low-rank delta",
    "lora_bias": "it trains a bias beside each factor, which a weight delta cannot hold",
    "modules_to_save": "it replaces whole modules; take the difference of two full checkpoints instead",
    "target_parameters": "its factors belong to fused expert parameters, not to linear layers",
    "layer_replication": "it changes the layers of the base",
    "alora_invocation_tokens": "it acts only after given tokens, so it is no constant change of the weight",
    "use_qalora": "it pools the inputs of each group before the factors",
    "use_bdlora": "its factors are block-diagonal shards",
    "arrow_config": "it is a router over other adapters",
    "kasa_config": "its factors stand beside a truncated base weight",
    "monteclora_config": "its factors are random variables",
    "trainable_token_indices": "it replaces rows of the embedding",
}
# Mixtures behind a router, which are no one weight change, and what to do with them.
ROUTED = {
    "XLORA": "Its experts are the LoRA folders that its config lists under 'adapters': name those, or moa.load it.",
    "MIXLORA": "Its experts are feed-forward blocks behind a gate: no weight change; moa.load reads it as a model.",
    "POLY": "It mixes its experts by task, and its layout is not read.",
}
# Initialisations that move part of the base weight into the factors: the file is a change of another base.
MOVED_BASE = ("pissa", "olora", "corda", "lora_ga")


def read_peft(path: str | Path) -> Deltas:
    """Return the deltas of a PEFT LoRA folder, ΔW = scale · B A with scale = alpha / r, or alpha / √r for rsLoRA.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.

    Returns:
        Low-rank deltas named as the base names its weights ("….q_proj.weight"): down (r, i), up (o, r) with the
        scale, rank_pattern and alpha_pattern included; float32, or float64 if the file is. `base` is the id
        written in the config. With fan_in_fan_out they are as such a base stores its weights, (i, o): the factors
        change places.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, is no LoRA, uses a setting that is not a plain
            low-rank change (each refused by name), or its ranks are not those of its config.
        ShapeError: a factor is not a matrix (convolution) or factors do not fit together.

    Source: Hu et al. 2021, arXiv 2106.09685; Kalajdzievski 2023, arXiv 2312.03732, for the scale of rsLoRA.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: expected a PEFT LoRA folder (adapter_config.json inside).")
    config = read_json(folder / "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        pickled = " (adapter_model.bin is a pickle, which moa does not read)" if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{file} is missing{pickled}: save the adapter again as safetensors.")
    return peft_deltas(Checkpoint(file), config, source=str(folder))


def peft_deltas(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, source: str = "adapter") -> Deltas:
    """Return the deltas of a PEFT LoRA state dict and its config: see `read_peft`.

    Args:
        tensors: "base_model.model.<module>.lora_A.weight" (r, i) and "….lora_B.weight" (o, r).
        config: the object of adapter_config.json.
        source: name used in errors.

    Returns:
        Lazy low-rank deltas, down (r, i) and up (o, r) with the scale.

    Raises:
        CheckpointError: not a plain LoRA, or a rank differs from the config's.
        ShapeError: a factor is not a matrix (convolution) or factors do not fit together.
    """
    _check_config(config, source)
    modules = _pairs(tensors, source)
    for module, (down, up) in modules.items():
        expected = _by_pattern(config.get("rank_pattern"), module, config["r"])
        shapes = [_shape(tensors, down), _shape(tensors, up)]
        if any(len(shape) != 2 for shape in shapes):
            raise ShapeError(
                f"{module!r} in {source} has factors {shapes[0]} and {shapes[1]}: only linear layers (matrices) are "
                "read as LoRA; a convolution's change must come as a dense tensor."
            )
        if shapes[0][0] != expected:
            raise CheckpointError(
                f"{module!r} in {source} has rank {shapes[0][0]}, its config says {expected} (r or rank_pattern): "
                "the scale alpha / r would be wrong; correct adapter_config.json."
            )

    def load(name: str) -> Delta:
        module = name.removesuffix(".weight")
        down, up = modules[module]
        delta = low_rank(tensors[down], tensors[up], _scale(config, module), where=module)
        return LowRank(delta.up.T, delta.down.T) if transposed else delta

    transposed = bool(config.get("fan_in_fan_out"))
    names = [f"{module}.weight" for module in modules]
    return Deltas(names, load, source, config.get("base_model_name_or_path") or None, transposed)


def _check_config(config: Mapping[str, Any], source: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        hint = f" {ROUTED[kind]}" if kind in ROUTED else ""
        raise CheckpointError(f"{source} has peft_type {kind!r}: expected 'LORA'.{hint}")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{source} sets {key}={config[key]!r}, and {reason}: it is refused.")
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"{source} sets bias={config['bias']!r}: its trained biases are no part of a low-rank delta and would be "
            "lost; it is refused. Train with bias='none', or take the difference of two full checkpoints."
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MOVED_BASE):
        raise CheckpointError(
            f"{source} sets init_lora_weights={init!r}, which moves part of the base into the factors: its product "
            "is not a change of the original base. Save it with PEFT's path_initial_model_for_weight_conversion."
        )
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise CheckpointError(f"{source} has r={config.get('r')!r}: expected a whole number ≥ 1.")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(f"{source} has lora_alpha={alpha!r}: expected a number.")


def _pairs(tensors: Mapping[str, Tensor], source: str) -> dict[str, tuple[str, str]]:
    """Return module -> (key of A, key of B); every other tensor of the file is refused by name."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        if "lora_magnitude_vector" in key:
            raise CheckpointError(f"{source} holds {key!r}: {REFUSED['use_dora']}; it is refused.")
        if "lora_embedding_" in key:
            raise CheckpointError(
                f"{source} holds {key!r}: LoRA on an embedding stores its factors transposed and is refused; take "
                "the difference of two full checkpoints."
            )
        match = re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise CheckpointError(
                f"{source} holds {key!r}, which is no LoRA factor (….lora_A.weight or ….lora_B.weight): a saved "
                "module or bias would be lost by the merge, so the adapter is refused."
            )
        module = match[1].removeprefix(PREFIX)
        found.setdefault(module, {})[match[2]] = key
    lonely = [module for module, keys in found.items() if len(keys) != 2]
    if lonely:
        raise CheckpointError(f"{source} holds only one of the two factors of {listed(lonely)}: it is incomplete.")
    if not found:
        raise CheckpointError(f"{source} holds no LoRA factors.")
    return {module: (keys["A"], keys["B"]) for module, keys in found.items()}


def _shape(tensors: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Return one tensor's shape, from the file's header where the mapping knows it."""
    known = getattr(tensors, "shapes", None)
    return tuple(known[key] if known is not None else tensors[key].shape)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that fits the end of the module's path, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _scale(config: Mapping[str, Any], module: str) -> float:
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
