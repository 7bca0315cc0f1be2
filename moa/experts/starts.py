"""Where LoRA's factors may start in place of zero: at components of the base's weight. PiSSA, OLoRA."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError
from .frozen import singular

Factors = tuple[Tensor, Tensor]


def pissa(weight: Tensor, rank: int, scale: float) -> Factors:
    """Return A₀ = √(S_r / s) V_r^T (r, i) and B₀^T = √(S_r / s) U_r^T (r, o), of the r largest components of W (o, i).

    Source: arXiv 2404.02948, eq. 2 to 4. s B₀ A₀ = U_r S_r V_r^T whatever the scale s is.

    Raises:
        ConfigError: r is above min(o, i).
    """
    u, s, vt = singular(weight, rank)
    root = (s / scale).sqrt().unsqueeze(1)  # (r, 1)
    return root * vt, root * u.T


def olora(weight: Tensor, rank: int, scale: float) -> Factors:
    """Return A₀ = R_r (r, i) and B₀^T = Q_r^T (r, o) of W = Q R (o, i): R's first r rows and Q's first r columns.

    Source: arXiv 2406.01775, algorithm 1. The diagonal of R is made positive: libraries choose other signs.

    Raises:
        ConfigError: r is above min(o, i).
    """
    if rank > min(weight.shape):
        raise ConfigError(
            f"a weight {tuple(weight.shape)} has {min(weight.shape)} columns of Q: rank={rank} is too many."
        )
    q, r = torch.linalg.qr(weight)
    q, r = q[:, :rank], r[:rank]
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(weight.dtype).unsqueeze(1)  # (r, 1)
    return signs * r, signs * q.T


STARTS: dict[str, Callable[[Tensor, int, float], Factors]] = {"pissa": pissa, "olora": olora}
