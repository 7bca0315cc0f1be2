"""What experts and routers of a recipe would take of the memory there is, said before any of it is taken."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ConfigError
from ..layers import Site
from ..mixture import placement
from ..recipes import Recipe
from ..recipes.lent import mixtures_with
from ..types import Scope

LARGE = 2**16  # numbers of this size, or products of experts and ranks, are worth the look
GROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def check_room(recipe: Recipe, sites: Sequence[Site], scope: Scope) -> None:
    """Check that the experts and routers of a recipe with large numbers fit into memory, before they are made.

    Layers (*rows, i) -> (*rows, o) are built without their tensors; a family that must look at the values of its
    layer's weight is then not counted.

    Args:
        recipe: of the layers.
        sites: of one model, in order.
        scope: of that model.

    Raises:
        ConfigError: they do not fit; what they take and what there is are named.
    """
    if not sites or not is_large(recipe):
        return
    device = placement(sites[0].module)[0]
    free = free_bytes(device)
    needed = None if free is None else bytes_of(recipe, sites, scope, free)
    if needed is not None and free is not None and needed > free:
        raise ConfigError(
            f"the experts and routers of this recipe would take {needed:,} bytes ({needed / 2**30:,.1f} GiB) or more "
            f"on {len(sites)} layers, and {device} has {free / 2**30:,.1f} GiB free: take fewer or smaller experts "
            f"(n_experts={recipe.n_experts}, rank={recipe.rank}), or fewer layers (targets)."
        )


def is_large(recipe: Recipe) -> bool:
    """Tell whether a keyword of a recipe or its family, or experts times rank, is large; no tensors, so no shapes."""
    values = [getattr(row, f.name) for row in (recipe, recipe.family) for f in dataclasses.fields(row)]
    whole = [value for value in values if isinstance(value, int)]
    return max([recipe.n_experts * recipe.largest_rank, *whole]) > LARGE


class TooMuch(Exception):
    """One tensor by itself is above what there is; no tensors here, so no shapes.

    Args:
        needed: its bytes.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _Each(TorchDispatchMode):
    """Looks at every tensor that is made, so that nothing goes on with one that could never be."""

    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # what is in a tensor, which sizes do not hang on
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() * out.element_size() > self.free:
            raise TooMuch(out.numel() * out.element_size())
        return out


def bytes_of(recipe: Recipe, sites: Sequence[Site], scope: Scope, free: int) -> int | None:
    """Return the bytes of a recipe's experts and routers on layers (*rows, i) -> (*rows, o); None where not known.

    Args:
        recipe: of the layers.
        sites: of one model, in order.
        scope: of that model.
        free: bytes that there are; of one tensor above that only its own bytes are returned.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
        UnsupportedFakeTensorException,
    )

    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Each(free):
            shared = recipe.shared(sites)
            mixtures = mixtures_with(recipe, sites, shared, scope)
            modules: list[nn.Module] = [*shared.values(), *(m.branches for m in mixtures)]
            return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(modules))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        return None
    except TooMuch as found:
        return found.needed
    except RuntimeError as error:
        if "overflowed" not in str(error):
            raise
        return sys.maxsize  # a size that torch cannot even count


def _tensors(modules: Iterable[nn.Module]) -> Iterable[torch.Tensor]:
    found = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return found.values()


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that a device (no shapes) has free, in bytes; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found = [_available(), *(_left(GROUP / most, GROUP / now) for most, now in LIMITS)]
    return min((value for value in found if value is not None), default=None)


def _available() -> int | None:
    """Return what the system gives away before it ends programs."""
    file = Path("/proc/meminfo")
    if file.is_file():
        rows = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        if "MemAvailable" in rows:
            return int(rows["MemAvailable"].split()[0]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left(most: Path, now: Path) -> int | None:
    """Return what a limit on this program's group leaves; None without one."""
    if not (most.is_file() and now.is_file()):
        return None
    limit = most.read_text().strip()
    return max(0, int(limit) - int(now.read_text())) if limit.isdecimal() and math.log2(int(limit) or 1) < 60 else None
