"""A named set of weight changes, as files and mappings give it: each is made when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from ..delta import Delta, Dense, LowRank, all_finite, low_rank, work_dtype
from ..errors import ConfigError, NumericsError

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


def check_tensors(tensors: Mapping[str, Tensor], refused: str) -> None:
    """Check that what is about to be written holds only numbers.

    Args:
        tensors: name -> tensor of any shape.
        refused: what is not done, which begins the error.

    Raises:
        NumericsError: one holds NaN or infinity; it is named.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NumericsError(
                f"{refused}: {name} holds NaN or infinity. Training diverged; go on from an earlier checkpoint."
            )
