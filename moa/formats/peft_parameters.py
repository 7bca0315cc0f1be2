"""PEFT's layout of a LoRA on fused expert tensors (`target_parameters`): the matrices' factors side by side.

Layout of PEFT 0.21: a module's tensors are wrapped one in the other, in their order, so the first has the longest key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..delta import LowRank
from ..errors import CheckpointError, FoldError
from ..mixture import ExpertsMixture
from ..mixture.change import factor_change, single
from ..mixture.fused_layouts import layout_of
from .foreign import Foreign
from .peft_options import is_set

PREFIX = "base_model.model."


def stacked_factors(mixture: ExpertsMixture, expert: int) -> tuple[dict[str, Tensor], int]:
    """Return one adapter's factors of each tensor by their key, and their rank r.

    A is (N · r, i), matrix after matrix; B is (o, r · N), rank after rank. PEFT takes a tensor for (N, o, i) unless its
    module says `is_transposed`; where the module does not say so, its matrices are those of the transposed change.

    Args:
        mixture: on fused experts, N matrices (o, i) in each tensor.
        expert: which adapter.

    Raises:
        FoldError: the adapters are not low-rank changes, or add a constant.
        ConfigError: no such adapter.
    """
    turned = mixture.layout.transposed and not getattr(mixture.base, "is_transposed", False)
    found: dict[str, Tensor] = {}
    rank = 0
    parts = mixture.slices()
    for depth, part in enumerate(reversed(parts)):
        downs, ups = [], []
        for layer in part.layers:
            change = factor_change(layer, lambda branch: single(branch.bank, expert))
            if not isinstance(change, LowRank):
                raise FoldError(f"{layer.name}: its experts are not low-rank changes, which a LoRA folder holds.")
            down, up = (change.up.T, change.down.T) if turned else (change.down, change.up)  # (r, i), (o, r)
            downs.append(down)
            ups.append(up)
        rank = downs[0].shape[0]
        key = "base_layer." * depth
        found[f"{key}lora_A.weight"] = torch.cat(downs).cpu().contiguous()
        found[f"{key}lora_B.weight"] = torch.stack(ups, -1).flatten(1).cpu().contiguous()
    return found, rank


def unstacked(found: Foreign, model: nn.Module) -> Foreign:
    """Return a folder whose factors on fused tensors, (N · r, i) and (o, r · N), are those of N matrices of their own.

    Matrix n of a tensor is "<module>.<tensor>.<n>", with factors (r, i) and (o, r) as any layer's.

    Args:
        found: the folder; one that targets no fused experts of this base, or others too, is returned as it is.
        model: the base.

    Raises:
        CheckpointError: patterns of ranks or scales, or factors that do not fit the tensors; the key is named.
    """
    targets: Any = found.config.get("target_parameters")
    modules = {path: getattr(m, "base", m) if isinstance(m, ExpertsMixture) else m for path, m in model.named_modules()}
    layouts = {path: (m, layout) for path, m in modules.items() if (layout := layout_of(m)) is not None}
    known = [f"{path}.{name}" for path, (_, layout) in layouts.items() for name in (layout.up, layout.down)]
    if not is_set(targets) or not all(any(_means(target, name) for name in known) for target in targets):
        return found
    for option in ("rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out"):
        if is_set(found.config.get(option)):
            raise CheckpointError(f"{found.path} sets {option} beside target_parameters: it is refused.")
    tensors = dict(found.tensors)
    for path, (base, layout) in layouts.items():
        names = [n for n in (layout.down, layout.up) if any(_means(target, f"{path}.{n}") for target in targets)]
        turned = layout.transposed and not getattr(base, "is_transposed", False)
        for depth, name in enumerate(names):
            key = f"{PREFIX}{path}." + "base_layer." * depth
            if f"{key}lora_A.weight" not in tensors and f"{key}lora_B.weight" not in tensors:
                continue
            try:
                a, b = tensors.pop(f"{key}lora_A.weight"), tensors.pop(f"{key}lora_B.weight")
            except KeyError as error:
                raise CheckpointError(f"{found.path} holds only one factor of {key!r}: it is incomplete.") from error
            size, d_in, d_out = layout.size(base, name)
            wide, high = (d_out, d_in) if turned else (d_in, d_out)
            rank = a.shape[0] // size
            if a.shape != (size * rank, wide) or b.shape != (high, rank * size):
                raise CheckpointError(
                    f"{found.path}: {key}lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}, and {name} holds "
                    f"{size} matrices {d_in} -> {d_out}: this adapter was made for another base."
                )
            ups = b.view(high, rank, size)
            for n, down in enumerate(a.view(size, rank, wide)):
                up = ups[:, :, n]
                down, up = (up.T, down.T) if turned else (down, up)  # (r, i), (o, r)
                tensors[f"{PREFIX}{path}.{name}.{n}.lora_A.weight"] = down.contiguous()
                tensors[f"{PREFIX}{path}.{name}.{n}.lora_B.weight"] = up.contiguous()
    config = {**found.config, "target_parameters": None}
    return dataclasses.replace(found, tensors=tensors, config=config)


def layers_of(names: set[str], model: nn.Module) -> dict[str, str]:
    """Return the layer that carries each adapted one: itself, or the module whose fused tensor (N, o, i) holds it."""
    modules = dict(model.named_modules())
    found = {name: name for name in names}
    for name in names - modules.keys():
        holder = name.rsplit(".", 2)[0]
        if layout_of(getattr(modules.get(holder), "base", modules.get(holder)) or nn.Identity()) is not None:
            found[name] = holder
    return found


def matrices_of(mixture: ExpertsMixture, changes: Mapping[str, object]) -> dict[str, tuple[int, int]]:
    """Return, for each matrix (o, i) that changes name, which of the mixture's two tensors holds it and its number."""
    tensors = (mixture.layout.up, mixture.layout.down)
    names = {
        f"{mixture.name}.{tensor}.{n}": (half, n)
        for half, tensor in enumerate(tensors)
        for n in range(mixture.layout.size(mixture.base, tensor)[0])
    }
    return {name: place for name, place in names.items() if name in changes}


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")
