"""How the features of a layer are cut into the modes of a tensor."""

from __future__ import annotations

import math
from typing import Any

from ..errors import ConfigError
from .frozen import divides


def checked_modes(modes: Any) -> int | tuple[int, ...]:
    """Return the keyword `modes` of a family: a number of modes, or the sizes of all but the last.

    Raises:
        ConfigError: fewer than one mode, or no size.
    """
    if isinstance(modes, int):
        if modes < 1:
            raise ConfigError(f"modes must be at least 1, got {modes}.")
        return modes
    sizes = tuple(modes)
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"modes must be a number, or sizes of at least 1 of all modes but the last, got {modes!r}.")
    return sizes


def mode_sizes(size: int, modes: int | tuple[int, ...], where: str) -> tuple[int, ...]:
    """Return the modes (d₁, …, d_N) of a side of `size` features, whose product it is.

    Args:
        size: features.
        modes: N, each then the largest divisor of the rest up to its root of that order; or the sizes of all but the
            last, which is the rest.
        where: name of the layer, used in errors.

    Raises:
        ConfigError: a size that does not divide what is left; the nearest that do are named.
    """
    found, rest = [], size
    if isinstance(modes, tuple):
        for at, mode in enumerate(modes):
            divides(f"modes[{at}]", mode, rest, where)
            found.append(mode)
            rest //= mode
        return (*found, rest)
    for left in range(modes, 1, -1):
        mode = max(d for d in range(1, math.isqrt(rest) + 1) if rest % d == 0 and d**left <= rest)
        found.append(mode)
        rest //= mode
    return (*found, rest)
