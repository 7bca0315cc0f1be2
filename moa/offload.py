"""Weights that accelerate keeps on the CPU or on disk: where they compute, and their values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError


def execution_device(module: nn.Module) -> torch.device | None:
    """Return the device on which accelerate runs a module or what is in it; None where it has not been told of it."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # several are in a sequence
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device  # accelerate numbers GPUs
    return None


@contextlib.contextmanager
def brought_in(module: nn.Module) -> Iterator[None]:
    """Have a module's own weights, of any shape, at hand inside the block, as its forward would."""
    if not hasattr(module, "_hf_hook"):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def value_of(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a parameter of a model (any shape) with its values; on the meta device still where nothing has them.

    Args:
        model: that holds it.
        name: of the parameter.
        tensor: the parameter itself.
    """
    if not tensor.is_meta:
        return tensor
    path, _, own = name.rpartition(".")
    holder = model.get_submodule(path)
    with brought_in(holder):
        found: Any = getattr(holder, own)
    return found  # type: ignore[no-any-return]


def check_trainable(model: nn.Module) -> None:
    """Check that what is trained of a model lies on a device with values: gradients of copies would be lost.

    Raises:
        ConfigError: a trained parameter of any shape is on the meta device; it is named.
    """
    lost = [name for name, tensor in model.named_parameters() if tensor.requires_grad and tensor.is_meta]
    if lost:
        raise ConfigError(
            f"{len(lost)} trained parameters are on the meta device ({lost[0]}, …), so no gradient would reach them: "
            "offload the base first and build on it then; a module that is trained whole must stay in memory."
        )


def check_device_map(device_map: Any) -> None:
    """Check that the devices which a device map names, as `from_pretrained` takes it, are there; no tensor is made.

    Raises:
        ConfigError: one is not.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here is not None else 0
    for place in device_map.values() if isinstance(device_map, Mapping) else (device_map,):
        if isinstance(place, int):
            there = place < count
        else:
            try:
                device = torch.device(place)
            except (RuntimeError, TypeError):  # "auto", "disk", …
                continue
            own = here is not None and device.type == here.type and (device.index or 0) < count
            there = own or device.type in ("cpu", "meta")
        if not there:
            seen = "no accelerator" if here is None else f"{count} of {here.type}"
            raise ConfigError(
                f"device_map names the device {place!r}, and torch sees {seen} here: name another, or no map."
            )
