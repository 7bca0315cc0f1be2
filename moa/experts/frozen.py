"""Frozen tensors that are made again in place of being stored: drawn from a seed, or derived from the base's weight."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import Site


def generator(seed: int, *names: str) -> torch.Generator:
    """Return a generator on the CPU for a seed and the names of what is drawn: the same on every machine and device.

    Args:
        seed: any whole number, one for a whole model.
        names: e.g. of a layer, so that each draws numbers of its own; none is the seed as it is.
    """
    # both in the lower 32 bits: on the CPU a generator looks at no others
    mixed = seed if not names else zlib.crc32("\0".join((str(seed), *names)).encode())
    return torch.Generator().manual_seed(mixed)


class Frozen(nn.Module):
    """Frozen tensors that the layers of one recipe share; no parameters.

    Args:
        tensors: name -> tensor of any shape.
        stored: they go into a checkpoint; False where a seed makes them again.
    """

    def __init__(self, tensors: Mapping[str, Tensor], stored: bool = False) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=stored)


def weight_of(site: Site, family: str) -> Tensor:
    """Return the weight W0 (o, i) that a family derives its tensors from, in float32, or float64 for such a base.

    Raises:
        ConfigError: there is none that can be read: quantised without a way back, on the meta device, or a grouped
            convolution; the layer and the family are named.
    """
    weight = site.weight().detach()
    if weight.is_meta:
        raise ConfigError(
            f"{site.name}: experts of the family {family!r} start from the base's weight, which is on the meta device "
            "and has no values yet: load the base before building on it."
        )
    return weight if weight.dtype == torch.float64 else weight.float()


def singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest singular triplets of a weight (o, i): U (o, r), S (r,), V^T (r, i).

    The largest entry of each left vector is made positive: other libraries of linear algebra choose other signs.

    Raises:
        ConfigError: r is above min(o, i).
    """
    if rank > min(weight.shape):
        raise ConfigError(
            f"a weight {tuple(weight.shape)} has {min(weight.shape)} singular values: rank={rank} is too many."
        )
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign().squeeze(0)  # (r,)
    return (u * signs).contiguous(), s, (vt * signs.unsqueeze(1)).contiguous()


def widest(sites: Sequence[Site]) -> tuple[int, int]:
    """Return the largest i and the largest o of some layers (i -> o)."""
    return max(site.d_in for site in sites), max(site.d_out for site in sites)


def divides(name: str, value: int, size: int, where: str) -> None:
    """Check that a structure's block of `value` places cuts a side of `size` places without rest.

    Raises:
        ConfigError: it does not; the nearest that do are named.
    """
    if value > 0 and size % value == 0:
        return
    fits = [d for d in range(1, size + 1) if size % d == 0]
    near = sorted(sorted(fits, key=lambda d: abs(d - value))[:3])
    raise ConfigError(
        f"{where}: {name}={value} does not divide {size}: the nearest that do are {', '.join(map(str, near))}."
    )
