"""Of how many components a spectrum of singular values is made: by rounding, by energy, by its bend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ConfigError


def numerical_rank(singular: Tensor, shape: Sequence[int]) -> int:
    """Return how many singular values (q,) are above rounding: σ > max(o, i) · eps · σ_max."""
    if singular.numel() == 0:
        return 0
    floor = max(shape) * torch.finfo(singular.dtype).eps * float(singular.max())
    return int((singular > floor).sum())


def rank_for_energy(singular: Tensor, energy: float) -> int:
    """Return the smallest k with Σ_{j≤k} σ_j² ≥ energy · Σ σ_j².

    Args:
        singular: (q,) descending.
        energy: share of the squared norm to keep, (0, 1].

    Returns:
        k, 0 for a zero change.

    Raises:
        ConfigError: the share is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}, expected a share of the squared norm in (0, 1].")
    squares = singular.double().square()
    # Tail sums from the smallest up, so that a share of 1 asks for the numerical rank and not for rounding noise.
    tail = torch.cat([squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)])
    allowed = (1 - energy) * float(tail[0]) + torch.finfo(singular.dtype).eps ** 2 * float(tail[0])
    return int((tail > allowed).sum())


def rank_at_elbow(singular: Tensor) -> int:
    """Return how many singular values come before the bend, at least 1.

    The bend is the value furthest below the straight line from the first to the last one.

    Args:
        singular: (q,) descending, q ≥ 1.

    Source: Satopaa et al. 2011, "Finding a Kneedle in a haystack", for a curve that falls.
    """
    q = len(singular)
    if q < 3:
        return q
    values = singular.double()
    line = values[0] + (values[-1] - values[0]) * torch.arange(q, device=values.device) / (q - 1)
    return max(1, int((line - values).argmax()))
