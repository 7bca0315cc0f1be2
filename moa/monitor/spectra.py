"""The singular values of weight changes: how many directions an expert uses, and how far two experts share them.

All of it depends on the product up · down only, not on how it is split into factors (its gauge).

Roy and Vetterli 2007 (effective rank); Björck and Golub 1973 (angles between subspaces); "Artificial Entanglement in
the Fine-Tuning of Large Language Models" (profiles over cuts).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..delta import Delta, LowRank, Sparse
from ..errors import ConfigError, ShapeError


def singular_values(change: Delta | Tensor) -> Tensor:
    """Return the singular values of ΔW (o, i), fp64, largest first: (r,) from its factors, else (min(o, i),)."""
    if isinstance(change, LowRank):
        _, left, right = _cores(change)
        return torch.linalg.svdvals(left @ right.T)
    return torch.linalg.svdvals(_matrix(change))


def entropy(values: Tensor) -> float:
    """Return S = -Σ p log p in nats, p = σ² / Σ σ², of singular values (n,); 0 where all are 0."""
    weights = values.double() ** 2
    if not weights.any():
        return 0.0
    p = weights / weights.sum()
    return max(torch.special.entr(p).sum().item(), 0.0)


def effective_rank(change: Delta | Tensor) -> float:
    """Return exp(S) of ΔW (o, i): from 1, one direction, to its rank, all alike; 0 for no change.

    Source: Roy and Vetterli 2007, with σ² in place of σ, as the entropy of `profile` has it.
    """
    return directions_used(singular_values(change))


def directions_used(values: Tensor) -> float:
    """Return exp(S) of singular values (n,), as `effective_rank` has it; 0 where all are 0."""
    return math.exp(entropy(values)) if values.any() else 0.0


def profile(change: Delta | Tensor) -> dict[int, float]:
    """Return the entropy over every cut of ΔW (o, i), seen as a tensor with one axis for each prime factor of o and i.

    A cut after n axes makes it a matrix of the first n against the others. The axes of o come first, so that one cut
    is between rows and columns: there the entropy is at most log r.

    Returns:
        Size of the part before the cut -> entropy in nats, from left to right.

    Raises:
        ShapeError: it is not a matrix.
    """
    if isinstance(change, LowRank):  # an orthonormal side changes no value: what is left has (o + i) r numbers
        (outputs, inputs), left, right = _cores(change)
        core = left @ right.T  # (r, r)
        o, i = change.shape
        parts = [(1, _primes(o), outputs @ core), (len(core), _primes(i), core @ inputs.T)]
    else:
        dense = _matrix(change)
        o, i = dense.shape
        parts = [(1, [*_primes(o), *_primes(i)], dense)]
    found, before = {}, 1
    for rows, sizes, matrix in parts:
        for size in sizes:
            rows, before = rows * size, before * size
            if before < o * i:  # behind the last axis there is nothing to cut off
                found[before] = entropy(torch.linalg.svdvals(matrix.reshape(rows, -1)))
    return found


def overlap(first: Delta, second: Delta) -> dict[str, float]:
    """Return how far two changes (o, i) share directions: 0 orthogonal, 1 where one's lie within the other's.

    - `outputs`, `inputs`: mean cos² of the angles between their column spaces, and between their row spaces.
    - `change`: cosine of the two as vectors, from -1 to 1.
    - `places`: for two sparse changes, places of both over places of either; absent otherwise.

    Raises:
        ShapeError: of other shapes.
    """
    if first.shape != second.shape:
        raise ShapeError(f"changes {tuple(first.shape)} and {tuple(second.shape)} are of other layers.")
    a, b = subspaces(first), subspaces(second)
    found = {side: subspaces_alike(x, y) for side, x, y in zip(("outputs", "inputs"), a, b, strict=True)}
    left, right = _matrix(first), _matrix(second)
    norms = left.norm() * right.norm()
    found["change"] = ((left * right).sum() / norms).item() if norms > 0 else 0.0
    if isinstance(first, Sparse) and isinstance(second, Sparse):
        shared = torch.isin(first.places, second.places).sum().item()
        found["places"] = shared / (len(first.places) + len(second.places) - shared)
    return found


def gradient_alignment(losses: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> tuple[list[str], Tensor]:
    """Return the cosine between the gradients of tasks: below 0 they pull parameters apart.

    Args:
        losses: by task, (), each with a graph of its own or one that is kept.
        parameters: of any shape, which the losses reach.

    Returns:
        The tasks, and their cosines (N, N), fp64.

    Raises:
        ConfigError: a loss reaches none of the parameters, or its gradient is 0.
    """
    names = list(losses)
    rows = []
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).double().flatten() for g, p in pairs])
        if not flat.any():
            raise ConfigError(f"the loss of {name!r} has no gradient in these parameters: its cosine is not defined.")
        rows.append(flat / flat.norm())
    stacked = torch.stack(rows)  # (N, P)
    return names, stacked @ stacked.T


def _cores(change: LowRank) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Return orthonormal bases (o, r), (i, r) of both sides, and triangles (r, r): ΔW = Q_o L Rᵀ Q_iᵀ."""
    outputs, left = torch.linalg.qr(change.up.double())
    inputs, right = torch.linalg.qr(change.down.double().T)
    return (outputs, inputs), left, right


def subspaces(change: Delta) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of the column space (o, n) and of the row space (i, n) of a change of rank n."""
    if isinstance(change, LowRank):
        (outputs, inputs), left, right = _cores(change)
        u, values, vh = torch.linalg.svd(left @ right.T)
        u, v = outputs @ u, inputs @ vh.T
    else:
        u, values, vh = torch.linalg.svd(_matrix(change), full_matrices=False)
        v = vh.T
    if not len(values):
        return u, v
    noise = values[0] * max(change.shape) * torch.finfo(change.dtype).eps  # what rounding alone leaves
    kept = values > noise
    return u[:, kept], v[:, kept]


def subspaces_alike(first: Tensor, second: Tensor) -> float:
    """Return the mean cos² of the angles between two subspaces, of orthonormal bases (d, n) and (d, m)."""
    fewer = min(first.shape[1], second.shape[1])
    return ((first.T @ second) ** 2).sum().item() / fewer if fewer else 0.0


def _matrix(change: Delta | Tensor) -> Tensor:
    dense = change if isinstance(change, Tensor) else change.dense()
    if dense.ndim != 2:
        raise ShapeError(f"a spectrum is that of a matrix (o, i), got {tuple(dense.shape)}.")
    return dense.detach().double()


def _primes(size: int) -> list[int]:
    """Return the prime factors of a size, largest first: 12 is 3 · 2 · 2."""
    found, factor = [], 2
    while size > 1:
        if size % factor:
            factor += 1
        else:
            found.append(factor)
            size //= factor
    return found[::-1]
