"""A weight change, dense or in low-rank factors, and a named set of them.

Low-rank form: LoRA (Hu et al. 2021, arXiv 2106.09685).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from .errors import ConfigError, NumericsError, ShapeError


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
    def dtype(self) -> torch.dtype:
        """Type it is computed in."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it lies."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return ΔW (o, i): the stored tensor itself where the delta is dense, a new one where it is low-rank."""

    @abstractmethod
    def scaled(self, factor: float) -> Delta:
        """Return factor · ΔW (o, i) as a new delta of the same form; factor is a plain number."""

    @abstractmethod
    def finite(self) -> bool:
        """Return whether every stored number is finite."""

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
    def dtype(self) -> torch.dtype:
        """Type of `weight`."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where `weight` lies."""
        return self.weight.device

    def dense(self) -> Tensor:
        """Return the stored ΔW (o, i), not a copy."""
        return self.weight

    def scaled(self, factor: float) -> Dense:
        """Return factor · ΔW (o, i), a new tensor."""
        return Dense(self.weight * factor)

    def finite(self) -> bool:
        """Return whether every entry of ΔW (o, i) is finite."""
        return all_finite(self.weight)


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
    def dtype(self) -> torch.dtype:
        """Type of the factors."""
        return self.up.dtype

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.up.device

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


DeltaLike: TypeAlias = Delta | Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]


def as_delta(value: object, name: str) -> Delta:
    """Return `value` as a delta.

    Args:
        value: a `Delta`; a tensor ΔW (o, i) of any shape; or factors (down (r, i), up (o, r)) with an optional scale.
        name: the parameter's name, for errors.

    Returns:
        The delta itself, or a new one in the work type.

    Raises:
        ShapeError: factors or types that do not belong together.
        ConfigError: something else came.
    """
    if isinstance(value, Delta):
        return value
    if isinstance(value, Tensor):
        return Dense(value.to(work_dtype(value.dtype)))
    if isinstance(value, tuple) and len(value) in (2, 3) and all(isinstance(v, Tensor) for v in value[:2]):
        return low_rank(value[0], value[1], float(value[2]) if len(value) == 3 else 1.0, where=name)
    raise ConfigError(
        f"the delta of {name!r} is a {type(value).__name__}: expected a Delta, a tensor, or a tuple "
        "(down, up) or (down, up, scale)."
    )


class Deltas(Mapping[str, Delta]):
    """A named set of weight changes, each made when it is asked for and not kept.

    Args:
        names: parameter names as the base model spells them, e.g. "model.layers.0.mlp.up_proj.weight".
        load: name -> its delta (o, i); called at every access, so memory holds one tensor at a time.
        source: where they come from, used in errors.
        base: id or folder of the base model they change; None when unknown.
        transposed: the base's layers store weights (i, o), as transformers' Conv1D does, so these changes are (i, o),
            too; None when unknown. Only a LoRA folder has to know: `write_peft`.
    """

    def __init__(
        self,
        names: Iterable[str],
        load: Callable[[str], Delta],
        source: str,
        base: str | None = None,
        transposed: bool | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._load = load
        self.source = source
        self.base = base
        self.transposed = transposed

    def __getitem__(self, name: str) -> Delta:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __repr__(self) -> str:
        return f"Deltas({len(self)} tensors, source={self.source!r}, base={self.base!r})"


def deltas(values: Mapping[str, DeltaLike], source: str = "mapping", base: str | None = None) -> Deltas:
    """Return a plain mapping as `Deltas`: this is how a mixture's experts, or any state dict, come in.

    Args:
        values: name -> tensor ΔW (o, i), factors (down (r, i), up (o, r)[, scale]), or a `Delta`.
        source: where they come from, used in errors.
        base: id or folder of the base model; None when unknown.

    Returns:
        Lazy deltas over the same tensors; the mapping is not copied and never written to.

    Raises:
        ConfigError: `values` is not a mapping. (Each tensor is checked when it is read.)
    """
    if isinstance(values, Deltas):
        return values
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{source}: expected a mapping name -> delta, got {type(values).__name__}. "
            "Read a folder with moa.merge.read_peft or moa.merge.read_difference."
        )
    return Deltas(values, lambda name: as_delta(values[name], name), source, base)


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return a short list of names for a message: the first few and how many more."""
    all_names = list(names)
    shown = ", ".join(repr(n) for n in all_names[:most]) or "none"
    return shown + (f" and {len(all_names) - most} more" if len(all_names) > most else "")


def inner(a: Delta, b: Delta) -> float:
    """Return the inner product of two changes, Σ ΔW_a ⊙ ΔW_b, without making low-rank ones dense.

    Σ (up_a down_a) ⊙ (up_b down_b) = Σ (up_aᵀ up_b) ⊙ (down_a down_bᵀ).

    Args:
        a: (o, i).
        b: the same shape.

    Returns:
        A Python float, summed in float64.
    """
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        left = a.up.double().T @ b.up.double()
        right = a.down.double() @ b.down.double().T
        return float((left * right).sum())
    return float(torch.dot(a.dense().reshape(-1).double(), b.dense().reshape(-1).double()))


def check_finite(delta: Delta, name: str, source: str) -> Delta:
    """Return `delta` (o, i) unchanged if all its numbers are finite.

    Raises:
        NumericsError: NaN or infinity, with the tensor's name, its source and how many there are.
    """
    if delta.finite():
        return delta
    parts = {"down": delta.down, "up": delta.up} if isinstance(delta, LowRank) else {"weight": delta.dense()}
    bad = ", ".join(
        f"{int((~torch.isfinite(t)).sum())} of {t.numel()} in {part}"
        for part, t in parts.items()
        if not torch.isfinite(t).all()
    )
    raise NumericsError(
        f"the delta of {name!r} from {source} holds NaN or infinity ({bad}): that adapter's training diverged or "
        "its file is damaged; leave it out or take an earlier checkpoint."
    )
