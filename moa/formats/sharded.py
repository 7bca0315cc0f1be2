"""Tensors whose values are spread over processes, and the whole of them."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import is_dense


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process holds a part of a tensor (any shape) only: FSDP2's, tensor parallelism's, ZeRO-3's."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_tensor")


def whole(name: str, tensor: Tensor) -> Tensor:
    """Return all values of a tensor (any shape); of a sharded one every process must ask, in the same order.

    Args:
        name: of the tensor, for the error.
        tensor: sharded or not.

    Raises:
        CheckpointError: DeepSpeed holds the values.
    """
    if hasattr(tensor, "ds_tensor"):
        raise CheckpointError(
            f"the values of {name} are spread over processes by DeepSpeed's ZeRO-3: save by Trainer or "
            "save_pretrained(folder, state_dict=accelerator.get_state_dict(engine)), which gathers them."
        )
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def is_matrix(tensor: Tensor) -> bool:
    """Tell whether a tensor holds floats as such in two axes, (o, i), or more: sharded or not, never codes."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.ndim >= 2 and (is_dense(local) or is_dense(local.detach()))


def writes() -> bool:
    """Tell whether this process writes what all of them have: the first of its machine, or the only one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return True
    return int(os.environ.get("LOCAL_RANK", torch.distributed.get_rank())) == 0


def writes_whole(model: nn.Module) -> bool:
    """Tell whether this process writes what is made of a model's own tensors (any shape), and needs no other for it.

    Raises:
        CheckpointError: other processes hold parts of them.
    """
    spread = next((name for name, p in model.named_parameters() if is_sharded(p)), None)
    if spread is not None:
        raise CheckpointError(
            f"the values of {spread} are spread over processes: save the model with save_pretrained, load that in one "
            "process, and write this from there."
        )
    return writes()
