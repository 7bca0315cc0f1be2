"""Adapters on the host: one flat, memory-mapped tensor each, so that loading one is one copy; few bits if asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..delta import Delta, LowRank, Sparse
from ..errors import CheckpointError
from ..formats.foreign import Foreign, read_foreign
from ..formats.peft_experts import expert_changes
from ..formats.peft_kinds import KINDS
from ..formats.peft_native import NativeAdapter
from ..formats.peft_start import base_of_model
from ..formats.precision_folders import set_for
from ..layers import features, is_convolution
from ..merge.codec import Coded, coded_bytes, encode

SHIRA = KINDS["shira"]


@dataclass(frozen=True)
class Part:
    """One layer's change among an adapter's numbers.

    Args:
        layer: its name.
        size: (o, i) of its weight.
        rank: r of a low-rank change; None is a sparse one.
        entries: n of a sparse one.
    """

    layer: str
    size: torch.Size
    rank: int | None
    entries: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """How many numbers each of its tensors has: down (r, i) and up (r, o), or values (n,)."""
        return (self.entries,) if self.rank is None else (self.rank * self.size[1], self.rank * self.size[0])


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """One adapter: the numbers of its layers one after the other, mapped from a file.

    Args:
        name: of the adapter.
        parts: its layers in order.
        numbers: (n,) floats, or (⌈n_j · bits / 8⌉ of each tensor j,) bytes.
        scales: (tensors, 2) mean and deviation of each coded tensor; None where nothing is coded.
        places: (n',) int64 of all sparse changes; None where there are none.
        bits: of a coded number.
    """

    name: str
    parts: tuple[Part, ...]
    numbers: Tensor
    scales: Tensor | None
    places: Tensor | None
    bits: int | None

    @property
    def n_bytes(self) -> int:
        """What it takes on the device, in bytes: decoded."""
        width = 4 if self.bits is not None else self.numbers.element_size()
        places = 0 if self.places is None else self.places.numel() * self.places.element_size()
        return width * sum(sum(part.lengths) for part in self.parts) + places

    @property
    def host_bytes(self) -> int:
        """What it takes on the host, in bytes."""
        held = (self.numbers, self.scales, self.places)
        return sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)

    def on(self, device: torch.device) -> dict[str, Delta]:
        """Return each layer's change (o, i) on a device: low-rank with up as (r, o) seen from the other side."""
        places = None if self.places is None else self.places.to(device)
        flat = torch.empty_like(self.numbers, device=device).copy_(self.numbers)
        tensors = flat.split(list(self._lengths())) if self.scales is None else self._decoded(flat)
        found: dict[str, Delta] = {}
        at, pieces = 0, iter(tensors)
        for part in self.parts:
            if part.rank is not None:
                down, up = next(pieces).view(part.rank, part.size[1]), next(pieces).view(part.rank, part.size[0])
                found[part.layer] = LowRank(down, up.T)
                continue
            assert places is not None
            found[part.layer] = Sparse(places[at : at + part.entries], next(pieces), part.size)
            at += part.entries
        return found

    def _lengths(self) -> Iterator[int]:
        return itertools.chain.from_iterable(part.lengths for part in self.parts)

    def _decoded(self, packed: Tensor) -> Iterator[Tensor]:
        assert self.scales is not None and self.bits is not None
        lengths, at = list(self._lengths()), 0
        for length, (mean, deviation) in zip(lengths, self.scales.to(packed.device), strict=True):
            end = at + coded_bytes(length, self.bits) - 8  # without mean and deviation
            yield Coded(packed[at:end], mean, deviation, torch.Size([length]), self.bits).decode()
            at = end


def put_on_host(
    name: str, folder: str | Path, model: nn.Module, file: Path, max_rank: int | None, bits: int | None = None
) -> HostAdapter:
    """Read a PEFT folder of a LoRA or a SHiRA, check it against a model, and return it mapped from a file of our own.

    Args:
        name: of the adapter.
        folder: of PEFT, or of one such for each precision of the base.
        model: whose layers, (*rows, i) -> (*rows, o), it is for.
        file: is written: the scale is in the up factors, so that nothing else has to be read.
        max_rank: the largest rank that is allowed; None is any.
        bits: of a number on the host, 1, 2, 4 or 8, each tensor by the codec of `moa.merge`; None is as it came.

    Raises:
        CheckpointError: a folder that is neither, or is for another base, or whose rank is too large.
        NumericsError: NaN or infinity in a factor.
        ConfigError: bits that the codec has not.
    """
    found = read_foreign(set_for(folder, model))
    layers = dict(model.named_modules())
    parts: list[Part] = []
    tensors: list[Tensor] = []
    places: list[Tensor] = []
    for layer, change in _changes(found, model).items():
        _check_layer(folder, layer, layers.get(layer), change.shape, model)
        if isinstance(change, Sparse):
            parts.append(Part(layer, change.shape, None, change.values.numel()))
            tensors.append(change.values)
            places.append(change.places)
            continue
        assert isinstance(change, LowRank)
        if max_rank is not None and change.rank > max_rank:
            raise CheckpointError(f"{folder} has rank {change.rank} on {layer}, this pool takes up to {max_rank}.")
        parts.append(Part(layer, change.shape, change.rank))
        tensors += [change.down.reshape(-1), change.up.T.reshape(-1)]
    stored = {} if not places else {"places": torch.cat(places)}
    if bits is None:
        stored["numbers"] = torch.cat(tensors).contiguous()
    else:
        coded = [encode(tensor, bits) for tensor in tensors]
        stored["numbers"] = torch.cat([one.packed for one in coded])
        stored["scales"] = torch.stack([torch.stack([one.mean, one.deviation]) for one in coded])
    save_file(stored, file)
    with safe_open(file, "pt") as opened:
        mapped: Any = {key: opened.get_tensor(key) for key in stored}
    return HostAdapter(name, tuple(parts), mapped["numbers"], mapped.get("scales"), mapped.get("places"), bits)


def _changes(found: Foreign, model: nn.Module) -> dict[str, Delta]:
    """Return a folder's changes (o, i) by layer."""
    if found.kind != SHIRA.peft_type:
        return dict(expert_changes(found, base_of_model(model)).items())
    read = NativeAdapter(found, SHIRA)
    changes: dict[str, Delta] = {}
    for layer, tensors in read.layers.items():
        size = features(model.get_submodule(layer)) if layer in dict(model.named_modules()) else None
        d_in, d_out = size or (0, 0)
        rows, columns = tensors["shira_indices"].long()  # (n,) each
        fits = size is not None and rows.numel() and int(rows.max()) < d_out and int(columns.max()) < d_in
        if size is not None and not fits:
            raise CheckpointError(
                f"{found.path} was made on another base: it changes {layer} at row {int(rows.max())}, column "
                f"{int(columns.max())}, here it is {d_in} -> {d_out}."
            )
        changes[layer] = Sparse(rows * d_in + columns, tensors["shira_weight"], torch.Size([d_out, d_in]))
    return changes


def _check_layer(folder: str | Path, layer: str, module: nn.Module | None, shape: torch.Size, model: nn.Module) -> None:
    size = None if module is None or is_convolution(module) else features(module)
    if size is None:
        raise CheckpointError(f"{folder} adapts {layer}, which is no linear layer of this {type(model).__name__}.")
    d_out, d_in = shape
    if size != (d_in, d_out):
        raise CheckpointError(
            f"{folder} was made on another base: it changes {layer} as {d_in} -> {d_out}, here it is "
            f"{size[0]} -> {size[1]}."
        )
