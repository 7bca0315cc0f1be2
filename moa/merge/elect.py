"""EMR: one unified change, and, for each task, a 1-bit mask and one scale.

EMR-Merging (arXiv 2405.17461).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..delta import Dense
from ..errors import ConfigError, ShapeError
from ..formats.named_deltas import DeltaLike, as_delta
from .codec import pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class Elected:
    """The result of EMR: what every task's change is rebuilt from.

    Args:
        unified: name -> τ (o, i) or any shape.
        masks: one mapping per task, name -> packed bits (⌈n / 8⌉,) uint8.
        scales: (T,) float64, one number per task.
    """

    unified: Mapping[str, Tensor]
    masks: Sequence[Mapping[str, Tensor]]
    scales: Tensor

    def delta(self, task: int) -> dict[str, Dense]:
        """Return λ_t M_t ⊙ τ of one task, name -> dense change (o, i).

        Raises:
            ConfigError: no such task.
        """
        if not 0 <= task < len(self.masks):
            raise ConfigError(f"emr: task {task} was asked for, there are tasks 0 … {len(self.masks) - 1}.")
        return {
            name: Dense(unpack_bits(self.masks[task][name], t.numel(), 1).view(t.shape) * t * float(self.scales[task]))
            for name, t in self.unified.items()
        }

    def nbytes(self) -> int:
        """Return the bytes of the unified change, the packed masks and the scales."""
        tensors = [*self.unified.values(), *(m for masks in self.masks for m in masks.values()), self.scales]
        return sum(t.numel() * t.element_size() for t in tensors)


def elect(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unified change of one tensor and every task's mask.

    γ = sgn Σ_t τ_t; ε = max over the tasks of sign γ of |τ_t|; τ = γ ⊙ ε; M_t = [τ_t ⊙ τ > 0].

    Args:
        stacked: τ_t, (T, *shape).

    Returns:
        τ (*shape) and M (T, *shape) bool.

    Source: Huang et al. 2024, arXiv 2405.17461 (elect, mask).
    Differs: where the sum is exactly 0 the released code elects "-"; here, as in the formula, the entry is 0.
    """
    sign = torch.sign(stacked.sum(0))
    agree = torch.sign(stacked) == sign
    unified = sign * (stacked.abs() * agree).amax(0)
    return unified, stacked * unified > 0


def emr(adapters: Sequence[Mapping[str, DeltaLike]]) -> Elected:
    """Return the unified change of several tasks, with each task's mask and scale.

    τ and M_t as in `elect`; λ_t = Σ |τ_t| / Σ |M_t ⊙ τ| over the whole model.

    Args:
        adapters: T mappings name -> τ_t (o, i) or any shape, dense or in factors, with equal names and shapes.

    Returns:
        `Elected`; `Elected.delta(t)` rebuilds task t. A task that agrees nowhere has scale 0.

    Raises:
        ConfigError: no adapters, or other names.
        ShapeError: other shapes.

    Source: Huang et al. 2024, arXiv 2405.17461 (elect, mask, rescale).
    Differs: the released code forms λ from a sum over tensors of mean magnitudes, which lets small tensors count as
        much as large ones; here, as in the paper, sums run over all entries.
    """
    if not adapters:
        raise ConfigError("emr: no adapters given.")
    names = list(adapters[0])
    for position, adapter in enumerate(adapters):
        if set(adapter) != set(names):
            raise ConfigError(f"emr: adapter {position} holds other names than adapter 0.")
    unified: dict[str, Tensor] = {}
    masks: list[dict[str, Tensor]] = [{} for _ in adapters]
    sums = torch.zeros(2, len(adapters), dtype=torch.float64)
    for name in names:
        parts = [as_delta(adapter[name], name).dense() for adapter in adapters]
        if len({p.shape for p in parts}) > 1:
            raise ShapeError(f"emr: {name!r} has shapes {[tuple(p.shape) for p in parts]}.")
        stacked = torch.stack(parts)
        unified[name], agree = elect(stacked)
        sums += magnitudes(stacked, unified[name], agree)
        for task in range(len(parts)):
            masks[task][name] = pack_bits(agree[task].to(torch.uint8), 1)
    return Elected(unified, masks, rescalers(sums))


def magnitudes(stacked: Tensor, unified: Tensor, agree: Tensor) -> Tensor:
    """Return Σ |τ_t| and Σ |M_t ⊙ τ| of one tensor (2, T) float64, on CPU.

    Args:
        stacked: τ_t, (T, *shape).
        unified: τ (*shape).
        agree: M (T, *shape) bool.
    """
    tasks = stacked.shape[0]
    own = stacked.reshape(tasks, -1).double().abs().sum(1)
    shared = (agree.reshape(tasks, -1) * unified.reshape(-1).double().abs()).sum(1)
    return torch.stack([own, shared]).cpu()


def rescalers(sums: Tensor) -> Tensor:
    """Return λ_t (T,) from the summed `magnitudes` (2, T); 0 for a task that agrees nowhere."""
    own, shared = sums
    return torch.where(shared > 0, own / shared.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
