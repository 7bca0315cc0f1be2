"""Sums over the processes that share a global batch, with their gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from ..errors import every_process


def over_processes(values: Sequence[Tensor], at: str = "this training forward") -> list[Tensor]:
    """Return the sums of tensors (any shapes) over all processes of torch.distributed; in one process, the tensors.

    One collective for all of them, and one in the backward pass: a tensor's gradient is the sum of those that its sum
    gets in every process. Data parallelism averages the gradients of what led to it, so a loss of the sums that every
    process has, weighted as it weighs its rows, is learned from as it would be in one process.

    Every process must call this equally often, and go backward from it or not alike.

    Args:
        values: of the same shapes in every process; on any devices.
        at: where all processes should be, named where one of them is not.

    Raises:
        ContextError: a process did not come within the timeout of its group.
    """
    if not values or not is_shared():
        return list(values)
    flat = torch.cat([value.flatten().to(values[0].device) for value in values])
    parts = _Sum.apply(flat, at).split([value.numel() for value in values])
    return [part.view(value.shape).to(value.device) for part, value in zip(parts, values, strict=True)]


def is_shared() -> bool:
    """Tell whether several processes share a global batch; no tensors."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


class _Sum(torch.autograd.Function):
    """Σ over processes; PyTorch's own function of this kind is deprecated, and its successor has no gradient in 2.9."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, at: str) -> Tensor:  # type: ignore[override]
        total = values.clone()
        with every_process(at):
            distributed.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        with every_process("the backward of this loss"):
            distributed.all_reduce(total)
        return total, None
