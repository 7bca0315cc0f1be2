"""What quantising a layer lost, restored by the few Walsh-Hadamard coefficients that its inputs notice most. QWHA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

DAMPING = 1e-4  # of the mean diagonal of X^T X, added to it
AT_ONCE = 2**24  # numbers of the systems that are solved together


@dataclass(frozen=True)
class Restored:
    """What a start restores of the outputs of one layer, on the data it was taken from.

    Args:
        before: ‖(W0 - W) X‖ / ‖W0 X‖ of the quantised weight W, damped as the start was.
        after: the same with the experts' change added to W; never more.
    """

    before: float
    after: float

    @property
    def share(self) -> float:
        """How much of the lost energy is restored, from 0 to 1, a number; 1 where nothing was lost."""
        return 1 - (self.after / self.before) ** 2 if self.before else 1.0


def quotas(norms: Tensor, count: int, most: int) -> Tensor:
    """Return how many coefficients each channel gets, (o,) int64, `count` in all, in proportion to norms (o,).

    None gets more than `most`; what is beyond goes to the others in proportion, and what is left by rounding to those
    that it took the largest part from.

    Args:
        norms: (o,), not negative.
        count: at most o · most.
        most: i.
    """
    norms = norms.double().clamp(min=norms.max().item() * 1e-12 or 1.0)  # where all are full, or 0, the others fill up
    full = torch.zeros_like(norms, dtype=torch.bool)
    while True:
        rest = count - most * int(full.sum())
        exact = torch.where(full, most, norms * (rest / norms[~full].sum().clamp(min=1e-300)))
        over = (exact > most) & ~full
        if not over.any():
            break
        full |= over
    out = exact.floor().long()
    room = torch.where(out < most, exact - out, -1.0)
    out[room.topk(count - int(out.sum())).indices] += 1
    return out


def coefficients(
    lost: Tensor, gram: Tensor, transform: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Return the start F (o, i), a sparse tensor of `count` entries, and ‖lost R‖² before and after it, (2,).

    Each output channel gets a share of the coefficients in proportion to the norm of its own, takes those that its
    inputs notice most, and fits them anew by least squares: min_F ‖(lost - F H^T / √i) R‖, R R^T = X^T X.

    Args:
        lost: W0 - W (o, i), float64.
        gram: X^T X (i, i), float64, damped.
        transform: x H / √i of rows (*rows, i), orthogonal.
        count: at most o · i.

    Source: arXiv 2509.17428, §3 and algorithm 1, and its released code.
    """
    spectrum = transform(lost)  # (o, i): lost = spectrum H^T / √i
    seen = transform(transform(gram).mT)  # (i, i): what X^T X is of coefficients
    target = spectrum @ seen  # (o, i)
    noticed = spectrum.abs() * seen.diagonal().sqrt()  # (o, i)
    own = quotas(spectrum.norm(dim=1), count, lost.shape[1])
    start = torch.zeros_like(lost)
    kept = torch.zeros_like(lost, dtype=torch.bool)
    channels = own.argsort(descending=True)
    while len(channels) and (k := int(own[channels[0]])):
        now, channels = channels[: max(1, AT_ONCE // k**2)], channels[max(1, AT_ONCE // k**2) :]
        places = noticed[now].topk(k).indices  # (c, k)
        inside = torch.arange(k, device=lost.device) < own[now].unsqueeze(1)  # (c, k)
        systems = seen[places.unsqueeze(2), places.unsqueeze(1)]  # (c, k, k)
        pairs = inside.unsqueeze(2) & inside.unsqueeze(1)
        systems = torch.where(pairs, systems, torch.eye(k, dtype=lost.dtype, device=lost.device))
        sides = torch.where(inside, target[now].gather(1, places), 0).unsqueeze(2)  # (c, k, 1)
        fitted = torch.cholesky_solve(sides, torch.linalg.cholesky(systems)).squeeze(2)  # (c, k)
        rows = now.unsqueeze(1).expand_as(places)
        start[rows[inside], places[inside]] = fitted[inside]
        kept[rows[inside], places[inside]] = True
    left = spectrum - start
    energies = torch.stack([(target * spectrum).sum(), (left @ seen * left).sum()])
    indices = kept.nonzero().T  # (2, n)
    return torch.sparse_coo_tensor(indices, start[kept], lost.shape, check_invariants=False), energies


def damped(gram: Tensor, where: str) -> Tensor:
    """Return X^T X (i, i) in float64 with a little of its mean diagonal added to it.

    Raises:
        ConfigError: all inputs are 0.
    """
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not mean > 0:
        raise ConfigError(f"{where}: all of its inputs are 0 on these batches, which say nothing about its weight.")
    return gram + DAMPING * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
