"""Adapters whose meaning depends on the base: what their start took from its weights, and DoRA's rescaling.

PiSSA (Meng et al. 2024, arXiv 2404.02948), OLoRA (Büyükakyüz 2024, arXiv 2406.01775), KaSA (Wang et al. 2024, arXiv
2412.06071), DoRA (Liu et al. 2024, arXiv 2402.09353), as PEFT 0.21 computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..delta import Delta, Dense, LowRank, work_dtype
from ..errors import CheckpointError
from ..experts.starts import STARTS
from ..layers import is_dense, matrix
from .tensor_files import Checkpoint


@dataclass(frozen=True)
class Base:
    """The weights that an adapter changes.

    Args:
        tensors: name -> tensor of any shape, as the base stores it.
        matrix: layer -> its weight as rows see it, (o, i); None where it has none, as quantised layers do.
    """

    tensors: Mapping[str, Tensor]
    matrix: Callable[[str], Tensor | None]

    def weight(self, module: str, why: str) -> Tensor:
        """Return a layer's weight (o, i) in the work type.

        Raises:
            CheckpointError: the base has no such layer, or it holds codes; `why` says what needs it.
        """
        found = self.matrix(module)
        if found is None or found.is_meta:
            raise CheckpointError(
                f"{why}, and the base has no dense weight of {module!r} at hand: another base, quantised or offloaded."
            )
        return found.detach().to(work_dtype(found.dtype))


def base_of_model(model: nn.Module) -> Base:
    """Return a model's weights, (o, i) whatever way its layers store them."""
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = {n: t for n, t in model.named_parameters(remove_duplicate=False) if is_dense(t)}
    return Base(tensors, lambda name: matrix(modules[name]) if name in modules else None)


def base_of_files(base: str | Path | Mapping[str, Tensor], transposed: bool) -> Base:
    """Return the weights of a checkpoint or a state dict; transposed: its linear layers store them (i, o).

    Raises:
        CheckpointError: nothing to read there.
    """
    tensors = base if isinstance(base, Mapping) else Checkpoint(base)

    def rows(module: str) -> Tensor | None:
        weight = tensors.get(f"{module}.weight")
        if weight is None or not is_dense(weight) or weight.ndim < 2:
            return None
        return weight.T if transposed and weight.ndim == 2 else weight.flatten(1)

    return Base(tensors, rows)


def taken(start: str, weight: Tensor, rank: int, scale: float) -> LowRank:
    """Return s B₀ A₀ (o, i), what a start of `STARTS` moved from W (o, i) into an adapter's factors."""
    down, up = STARTS[start](weight, min(rank, *weight.shape), scale)
    return LowRank(down, up.T * scale)


def kasa(weight: Tensor, rank: int) -> LowRank:
    """Return the r smallest singular components of W (o, i), which KaSA cut off the base.

    Raises:
        CheckpointError: a rank that leaves nothing of the weight.

    Source: arXiv 2412.06071, eq. 3.
    """
    if rank >= min(weight.shape):
        raise CheckpointError(f"KaSA of rank {rank} cuts off all of a weight {tuple(weight.shape)}.")
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(vh[-rank:], u[:, -rank:] * s[-rank:])


def less(change: Delta, lost: LowRank) -> Delta:
    """Return change - lost (o, i), of the sum of the ranks where the change is low-rank."""
    return change + LowRank(lost.down.to(change.device), -lost.up.to(change.device))


def dora(weight: Tensor, change: Delta, magnitude: Tensor) -> Dense:
    """Return m (W + ΔV) / ‖W + ΔV‖ - W (o, i), norms over each row.

    Args:
        weight: W, (o, i).
        change: ΔV, (o, i).
        magnitude: m, o numbers in any shape.

    Raises:
        CheckpointError: not one number per row.

    Source: arXiv 2402.09353, eq. 5.
    """
    if magnitude.numel() != weight.shape[0]:
        raise CheckpointError(f"DoRA's magnitude has {magnitude.numel()} numbers, the weight {weight.shape[0]} rows.")
    dtype = torch.promote_types(weight.dtype, change.dtype)
    moved = weight.to(dtype) + change.dense().to(weight.device, dtype)  # (o, i)
    factor = magnitude.reshape(-1, 1).to(moved) / moved.norm(dim=1, keepdim=True)  # (o, 1)
    return Dense(factor * moved - weight.to(dtype))
