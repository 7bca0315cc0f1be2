"""Tensors whose values are spread over processes, and the whole of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import is_dense


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether this process holds a part of a tensor (any shape) only: FSDP2's, tensor parallelism's, ZeRO-3's."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_tensor")


def size_of(tensor: Tensor) -> int:
    """Return how many values a tensor (any shape) has, all its parts together."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def whole(tensor: Tensor) -> Tensor:
    """Return all values of a tensor (any shape); of a sharded one every process must ask, in the same order.

    Args:
        tensor: sharded or not; under ZeRO-3 the parameter itself, whose partition a detached one has lost.
    """
    if hasattr(tensor, "ds_tensor"):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def chosen_of(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors (any shape) of some names, of those that an engine has gathered.

    Raises:
        CheckpointError: one is not there.
    """
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(
            f"the state_dict to save lacks {len(missing)} tensors, e.g. {missing[0]}. Where an engine spreads them, "
            "let it gather them: DeepSpeed's stage3_gather_16bit_weights_on_model_save is true for that; or pass none."
        )
    return {name: state[name] for name in names}


def is_matrix(tensor: Tensor) -> bool:
    """Tell whether a tensor holds floats as such in two axes, (o, i), or more: sharded or not, never codes."""
    local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return len(getattr(tensor, "ds_shape", tensor.shape)) >= 2 and (is_dense(local) or is_dense(local.detach()))


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
