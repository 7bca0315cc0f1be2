"""LoRA adapters on the host: one flat, memory-mapped tensor each, so that loading one is one copy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..delta import LowRank
from ..errors import CheckpointError
from ..formats.foreign import read_foreign
from ..formats.peft_experts import expert_changes
from ..formats.peft_start import base_of_model
from ..formats.precision_folders import set_for
from ..layers import features, is_convolution

Layout = tuple[tuple[str, int, int, int], ...]  # of each layer: name, r, i, o


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """One adapter: its factors one after the other, down (r, i) then up (r, o) of each layer, mapped from a file.

    Args:
        name: of the adapter.
        flat: (n,) all numbers.
        layout: where each layer's lie.
    """

    name: str
    flat: Tensor
    layout: Layout

    @property
    def n_bytes(self) -> int:
        """What it takes on the device, in bytes."""
        return self.flat.numel() * self.flat.element_size()

    def factors(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return down (r, i) and up (r, o) of each layer, as views of a copy of `flat` (n,)."""
        found, at = {}, 0
        for layer, rank, d_in, d_out in self.layout:
            middle, end = at + rank * d_in, at + rank * (d_in + d_out)
            found[layer] = flat[at:middle].view(rank, d_in), flat[middle:end].view(rank, d_out)
            at = end
        return found


def put_on_host(name: str, folder: str | Path, model: nn.Module, file: Path, max_rank: int | None) -> HostAdapter:
    """Read a PEFT LoRA folder, check it against a model, and return it mapped from a file of our own.

    Args:
        name: of the adapter.
        folder: of PEFT, or of one such for each precision of the base.
        model: whose layers, (*rows, i) -> (*rows, o), it is for.
        file: is written: the scale is in the up factors, so that nothing else has to be read.
        max_rank: the largest rank that is allowed; None is any.

    Raises:
        CheckpointError: a folder that is not a LoRA, or is for another base, or whose rank is too large.
        NumericsError: NaN or infinity in a factor.
    """
    changes = expert_changes(read_foreign(set_for(folder, model)), base_of_model(model))
    layers = dict(model.named_modules())
    layout, parts = [], []
    for layer, change in changes.items():
        assert isinstance(change, LowRank)
        module = layers.get(layer)
        size = None if module is None or is_convolution(module) else features(module)
        if size is None:
            raise CheckpointError(f"{folder} adapts {layer}, which is no linear layer of this {type(model).__name__}.")
        d_out, d_in = change.shape
        if size != (d_in, d_out):
            raise CheckpointError(
                f"{folder} was made on another base: it changes {layer} as {d_in} -> {d_out}, here it is "
                f"{size[0]} -> {size[1]}."
            )
        if max_rank is not None and change.rank > max_rank:
            raise CheckpointError(f"{folder} has rank {change.rank} on {layer}, this pool takes up to {max_rank}.")
        layout.append((layer, change.rank, d_in, d_out))
        parts += [change.down.reshape(-1), change.up.T.reshape(-1)]
    save_file({"factors": torch.cat(parts).contiguous()}, file)
    with safe_open(file, "pt") as opened:
        return HostAdapter(name, opened.get_tensor("factors"), tuple(layout))
