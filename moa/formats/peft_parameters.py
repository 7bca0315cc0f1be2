"""PEFT's layout of a LoRA on fused expert tensors (`target_parameters`): the matrices' factors side by side.

Layout of PEFT 0.21: a module's tensors are wrapped one in the other, in their order, so the first has the longest key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..delta import LowRank
from ..errors import FoldError
from ..mixture import ExpertsMixture
from ..mixture.change import factor_change, single


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
