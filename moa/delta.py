"""A weight change as it is: low-rank factors, a few entries, or one dense tensor.

Folding, exporting, merging and switching work only on these. Low-rank form: LoRA (Hu et al. 2021, arXiv 2106.09685);
sparse form: SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type deltas are computed in: float32 for the half and 8-bit types, else the type itself.

    A scale or a sum rounded to bfloat16 would lose what the merge is about.

    Args:
        dtype: floating type of the stored tensor.

    Returns:
        torch.float64 for float64, torch.float32 for every other floating type.

    Raises:
        ShapeError: `dtype` is not a floating type.
    """
    if not dtype.is_floating_point:
        raise ShapeError(f"a delta needs floating numbers, got {dtype}: leave integer tensors out of the merge.")
    return torch.float64 if dtype == torch.float64 else torch.float32


def all_finite(tensor: Tensor) -> bool:
    """Return whether every entry of a tensor (any shape) is finite."""
    # A finite sum has finite terms and is thirty times as fast to get; it may overflow, so only that way round.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


class Delta(ABC):
    """One weight change ΔW (o, i), or of any shape when dense."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape of the dense change: (o, i) for a matrix."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """A tensor that is kept, of any shape: it says type and device."""

    @property
    def dtype(self) -> torch.dtype:
        """Type it is computed in."""
        return self.stored.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.stored.device

    @abstractmethod
    def dense(self) -> Tensor:
        """Return ΔW (o, i): the stored tensor itself where the delta is dense, a new one where it is low-rank."""

    @abstractmethod
    def scaled(self, factor: float) -> Delta:
        """Return factor · ΔW (o, i) as a new delta of the same form; factor is a plain number."""

    def finite(self) -> bool:
        """Return whether every stored number is finite."""
        return all_finite(self.stored)

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Delta:
        """Return the same change of the same form in another type."""

    @abstractmethod
    def before(self, matrix: Tensor) -> Delta:
        """Return ΔW · M (o, j) of M (i, j): the change, seen from what M reads."""

    def __add__(self, other: Delta) -> Delta:
        """Return the sum (o, i): of one form where both have it, else dense.

        Raises:
            ShapeError: the shapes differ.
        """
        if self.shape != other.shape:
            raise ShapeError(f"changes of shapes {tuple(self.shape)} and {tuple(other.shape)} have no sum.")
        return Dense(self.dense() + other.dense())

    @torch.no_grad()
    def write_into(self, weight: Tensor) -> Undo:
        """Add the change to a weight in place, and return what puts the old values back, bit for bit.

        The sum is formed in the wider of the two types and rounded once to the weight's.

        Args:
            weight: (o, i), or any shape of as many values, as a convolution stores it; changed in place.

        Raises:
            ShapeError: another number of values.
        """
        _check_size(self.shape, weight)
        undo = Undo(weight, None, weight.detach().clone())
        change = self.dense().to(weight.device).view(weight.shape)
        weight.copy_(weight.to(torch.promote_types(weight.dtype, change.dtype)) + change)
        return undo

    def zeros(self) -> LowRank | Dense:
        """Return the zero change of this shape: rank 0 (o, 0)·(0, i) for a matrix, else dense."""
        if len(self.shape) != 2:
            return Dense(torch.zeros(self.shape, dtype=self.dtype, device=self.device))
        o, i = self.shape
        down = torch.zeros(0, i, dtype=self.dtype, device=self.device)
        return LowRank(down, torch.zeros(o, 0, dtype=self.dtype, device=self.device))


@dataclass(frozen=True, eq=False)
class Dense(Delta):
    """A change kept as one tensor.

    Args:
        weight: ΔW, (o, i) or any other shape, float32 or float64.
    """

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of `weight`."""
        return self.weight.shape

    @property
    def stored(self) -> Tensor:
        """`weight`."""
        return self.weight

    def dense(self) -> Tensor:
        """Return the stored ΔW (o, i), not a copy."""
        return self.weight

    def scaled(self, factor: float) -> Dense:
        """Return factor · ΔW (o, i), a new tensor."""
        return Dense(self.weight * factor)

    def to(self, dtype: torch.dtype) -> Dense:
        """Return ΔW (o, i) in another type."""
        return Dense(self.weight.to(dtype))

    def before(self, matrix: Tensor) -> Dense:
        """Return ΔW · M, (o, j) of M (i, j)."""
        return Dense(self.weight @ matrix.to(self.dtype))


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """A change ΔW = up · down kept in its factors, with every scale already in `up`.

    Args:
        down: (r, i), A in prose.
        up: (o, r), B in prose, times alpha / r or whatever the adapter's scale was.
    """

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> torch.Size:
        """(o, i)."""
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    @property
    def stored(self) -> Tensor:
        """`up`."""
        return self.up

    @property
    def rank(self) -> int:
        """Number of columns of `up`, r; the numerical rank may be smaller."""
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """Return up · down (o, i), a new tensor."""
        return self.up @ self.down

    def scaled(self, factor: float) -> LowRank:
        """Return the same `down` (r, i) with factor · `up` (o, r)."""
        return LowRank(self.down, self.up * factor)

    def finite(self) -> bool:
        """Return whether every entry of `down` (r, i) and `up` (o, r) is finite."""
        return all_finite(self.down) and all_finite(self.up)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Return down (r, i) and up (o, r) in another type."""
        return LowRank(self.down.to(dtype), self.up.to(dtype))

    def before(self, matrix: Tensor) -> LowRank:
        """Return ΔW · M as factors: down · M (r, j) of M (i, j), and up (o, r)."""
        return LowRank(self.down @ matrix.to(self.dtype), self.up)

    def __add__(self, other: Delta) -> Delta:
        """Return the sum (o, i), of two low-rank changes as factors whose ranks add up."""
        if not isinstance(other, LowRank) or self.shape != other.shape:
            return super().__add__(other)
        dtype = torch.promote_types(self.dtype, other.dtype)
        downs, ups = [self.down.to(dtype), other.down.to(dtype)], [self.up.to(dtype), other.up.to(dtype)]
        return LowRank(torch.cat(downs), torch.cat(ups, 1))


@dataclass(frozen=True, eq=False)
class Sparse(Delta):
    """A change of a few entries.

    Args:
        places: (n,) int64, distinct places in the flattened weight.
        values: (n,) what is added there.
        size: (o, i) of the weight.
    """

    places: Tensor
    values: Tensor
    size: torch.Size

    @property
    def shape(self) -> torch.Size:
        """(o, i)."""
        return self.size

    @property
    def stored(self) -> Tensor:
        """`values`."""
        return self.values

    def dense(self) -> Tensor:
        """Return ΔW (o, i), a new tensor."""
        flat = self.values.new_zeros(self.size.numel())
        return flat.scatter(0, self.places, self.values).view(self.size)

    def scaled(self, factor: float) -> Sparse:
        """Return factor · ΔW (o, i) at the same places."""
        return Sparse(self.places, self.values * factor, self.size)

    def to(self, dtype: torch.dtype) -> Sparse:
        """Return the values (n,) in another type."""
        return Sparse(self.places, self.values.to(dtype), self.size)

    def before(self, matrix: Tensor) -> Dense:
        """Return ΔW · M, (o, j) of M (i, j), which is not sparse."""
        rows, columns = self.places // self.size[1], self.places % self.size[1]
        sparse = torch.sparse_coo_tensor(torch.stack([rows, columns]), self.values, self.size, check_invariants=False)
        return Dense(torch.sparse.mm(sparse, matrix.to(self.dtype)))

    def __add__(self, other: Delta) -> Delta:
        """Return the sum (o, i), of two sparse changes at the places of both."""
        if not isinstance(other, Sparse) or self.shape != other.shape:
            return super().__add__(other)
        places, where = torch.cat([self.places, other.places]).unique(return_inverse=True)
        values = torch.cat([self.values, other.values])
        return Sparse(places, values.new_zeros(places.numel()).index_add(0, where, values), self.size)

    @torch.no_grad()
    def write_into(self, weight: Tensor) -> Undo:
        """Add the values to a weight (o, i) in place; only the n old values under them are kept for the way back."""
        _check_size(self.size, weight)
        flat, places = weight.view(-1), self.places.to(weight.device)
        old = flat[places]
        flat[places] = (old.to(torch.promote_types(old.dtype, self.dtype)) + self.values.to(old.device)).to(old.dtype)
        return Undo(weight, places, old)


@dataclass(frozen=True, eq=False)
class Undo:
    """Puts back what `Delta.write_into` overwrote: stored values, so bit for bit.

    Args:
        weight: the tensor that was changed, (o, i).
        places: (n,) places in the flattened weight; None is all of them.
        values: (n,), or of the weight's shape, what was there.
    """

    weight: Tensor
    places: Tensor | None
    values: Tensor

    @torch.no_grad()
    def restore(self) -> None:
        """Write the old values back."""
        if self.places is None:
            self.weight.copy_(self.values)
        else:
            self.weight.view(-1)[self.places] = self.values


def _check_size(size: torch.Size, weight: Tensor) -> None:
    if size.numel() != weight.numel():
        raise ShapeError(f"a change of shape {tuple(size)} does not fit a weight of shape {tuple(weight.shape)}.")


def total(parts: Sequence[Delta]) -> Delta:
    """Return the sum of one or more changes (o, i), in one form where all have it."""
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out


def low_rank(down: Tensor, up: Tensor, scale: float = 1.0, where: str = "") -> LowRank:
    """Return ΔW = scale · up · down as factors, the scale multiplied into `up`.

    Args:
        down: (r, i) floating.
        up: (o, r) floating.
        scale: what the adapter multiplies its product by, e.g. alpha / r.
        where: name used in errors.

    Returns:
        New factors in the work type (see `work_dtype`); `down` is shared with the input if it already has it.

    Raises:
        ShapeError: a factor is not a matrix, or the ranks or devices differ.
        ConfigError: the scale is not finite.
    """
    place = f" of {where!r}" if where else ""
    if down.ndim != 2 or up.ndim != 2:
        raise ShapeError(
            f"low-rank factors{place} must be matrices (r, i) and (o, r), got {tuple(down.shape)} and "
            f"{tuple(up.shape)}: pass a convolution's change as one dense tensor."
        )
    if down.shape[0] != up.shape[1]:
        raise ShapeError(
            f"the factors{place} have different ranks: down (r, i) is {tuple(down.shape)}, up (o, r) is "
            f"{tuple(up.shape)}. Check that they are not swapped or transposed."
        )
    if down.device != up.device:
        raise ShapeError(f"the factors{place} are on {down.device} and {up.device}: move them to one device.")
    if not math.isfinite(scale):
        raise ConfigError(f"the scale{place} is {scale}: expected a finite number.")
    dtype = work_dtype(torch.promote_types(down.dtype, up.dtype))
    scaled = up.to(dtype) * scale if scale != 1 else up.to(dtype)
    return LowRank(down.to(dtype), scaled)
