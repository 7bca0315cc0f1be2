"""Principal components of many rows without keeping the rows. Ross et al. 2008 (incremental, with the mean)."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from ..objective.exchange import over_processes


class Principal:
    """The principal components of all rows (T, i) that were added: right singular vectors of rows less their mean.

    Where these span no more than `size` directions the result is exact; beyond, what is smallest is dropped each time.

    Args:
        size: directions that are kept, at least as many as are asked for later; twice as many lose little.
    """

    def __init__(self, size: int) -> None:
        self.size, self.count, self.energy = size, 0, 0.0

    def add(self, rows: Tensor) -> None:
        """Add rows (T, i)."""
        if not len(rows):
            return
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        mean = rows.mean(0)  # (i,)
        centred = rows - mean  # (T, i)
        self.energy += float(centred.double().square().sum())
        if not self.count:
            self.count, self.mean, self.kept = len(rows), mean, self._largest(centred)
            return
        total = self.count + len(rows)
        moved = (self.count * len(rows) / total) ** 0.5 * (self.mean - mean)  # what lies between the two means
        self.energy += float(moved.double().square().sum())
        self.kept = self._largest(torch.cat([self.kept, centred, moved.unsqueeze(0)]))
        self.mean = self.mean + (mean - self.mean) * (len(rows) / total)
        self.count = total

    def over_processes(self) -> None:
        """Have the rows of all processes of torch.distributed; each must call this equally often."""
        if not distributed.is_available() or not distributed.is_initialized():
            return
        width, mine = len(self.mean), distributed.get_rank()
        places = self.kept.new_zeros(distributed.get_world_size(), self.size + 1, width)  # (world, size + 1, i)
        places[mine, : len(self.kept)] = self.kept
        sums = torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean]).double()  # (1 + i,)
        (sums,) = over_processes([sums])
        mean = (sums[1:] / sums[0]).to(self.mean.dtype)
        places[mine, -1] = self.count**0.5 * (self.mean - mean)
        between = float(places[mine, -1].double().square().sum())
        (places,) = over_processes([places])
        (energy,) = over_processes([sums.new_tensor([self.energy + between])])
        self.count, self.mean, self.energy = int(sums[0]), mean, float(energy)
        self.kept = self._largest(places.flatten(0, 1))

    def directions(self, n: int) -> tuple[Tensor, float]:
        """Return the n first components (≤ n, i), and the share of the variance along them.

        There are fewer than n where the rows span fewer. The largest entry of each is positive.
        """
        _, values, vectors = torch.linalg.svd(self.kept, full_matrices=False)
        noise = values[0] * max(self.kept.shape) * torch.finfo(values.dtype).eps
        n = min(n, int((values > noise).sum()))
        vectors = vectors[:n]
        signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()  # (n, 1)
        share = float(values[:n].double().square().sum()) / self.energy if self.energy else 0.0
        return vectors * signs, share

    def _largest(self, rows: Tensor) -> Tensor:
        """Return S V^T (≤ size, i) of the largest singular values of rows (T, i)."""
        if len(rows) <= self.size:
            return rows
        if len(rows) > rows.shape[1]:
            rows = torch.linalg.qr(rows, mode="r").R  # (i, i), of the same singular values and right vectors
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        return values[: self.size].unsqueeze(1) * vectors[: self.size]
