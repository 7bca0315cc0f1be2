"""`merge`: several deltas into one, offline, tensor by tensor.

The methods are the rows of `moa.merge.methods.METHODS`; their papers are named there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ..delta import Delta
from ..errors import ConfigError, unknown_name
from ..formats.named_deltas import DeltaLike, Deltas, deltas, listed
from .compose import check_weights, normalised
from .jobs import Job, Method, Plan, naming, read_options
from .methods import METHODS
from .subspace import total


def merge(
    adapters: Sequence[Mapping[str, DeltaLike]],
    weights: Sequence[float] | None = None,
    method: str = "ties",
    *,
    missing: str = "refuse",
    same_base: bool = True,
    progress: bool = False,
    **options: Any,
) -> Deltas:
    """Return several deltas merged into one, tensor by tensor, by a row of `METHODS`.

    Args:
        adapters: n sets of deltas: from `read_peft`, `read_difference`, or plain mappings name -> tensor ΔW (o, i) or
            factors (down (r, i), up (o, r)[, scale]). They are only read.
        weights: (n,) numbers in the adapters' order; the method's own neutral ones (1, or 1/n for averages) if None.
        method: name of the row.
        missing: "refuse" if the adapters do not hold the same names, or "zero": a missing delta counts as no change.
        same_base: refuse adapters that name different base models.
        progress: show a bar.
        **options: the method's keywords.

    Returns:
        name -> merged delta (o, i), low-rank where the method keeps it so; float32, or float64 if an input is.

    Raises:
        ConfigError: no adapters, an unknown method or keyword, weights that do not match, other names or base.
        ShapeError: a tensor's shape differs between adapters.
        NumericsError: a delta holds NaN or infinity (it is named).
        CheckpointError: a file is damaged.

    Source: the method's row.
    """
    lazy = merge_lazily(adapters, weights, method, missing=missing, same_base=same_base, **options)
    made = {name: lazy[name] for name in tqdm(lazy, desc=f"merge {method}", disable=not progress)}
    return Deltas(made, made.__getitem__, lazy.source, lazy.base, lazy.transposed)


def merge_lazily(
    adapters: Sequence[Mapping[str, DeltaLike]],
    weights: Sequence[float] | None = None,
    method: str = "ties",
    *,
    missing: str = "refuse",
    same_base: bool = True,
    **options: Any,
) -> Deltas:
    """Return the same merge as `merge`, each tensor (o, i) made when it is asked for: memory holds one at a time.

    What a method must know of the whole model (a threshold, learnt coefficients) is computed here, in passes that
    read one tensor at a time; the rest when a tensor is read, and again if it is read again.

    Args:
        adapters: as for `merge`.
        weights: as for `merge`.
        method: as for `merge`.
        missing: as for `merge`.
        same_base: as for `merge`.
        **options: the method's keywords.

    Returns:
        Lazy deltas, with the adapters' base.

    Raises:
        ConfigError: as for `merge`.
        ShapeError: as for `merge`, when a tensor is read.
        NumericsError: as for `merge`, when a tensor is read.
    """
    plan = make_plan(adapters, weights, method, missing=missing, same_base=same_base, options=options)
    row = plan.method
    state = row.prepare(plan) if row.prepare else None

    def load(name: str) -> Delta:
        parts = plan.aligned(name)
        with naming(name):
            if row.fits is not None and not row.fits(parts[0].shape, len(parts)):
                return total(parts, normalised(plan.weights, row.name))
            return row.run(Job(plan, name, parts, state))

    base = next((a.base for a in plan.adapters if a.base is not None), None)
    transposed = next((a.transposed for a in plan.adapters if a.transposed is not None), None)
    return Deltas(plan.names, load, f"merge {method}", base, transposed)


def make_plan(
    adapters: Sequence[Mapping[str, DeltaLike]],
    weights: Sequence[float] | None,
    method: str,
    *,
    missing: str,
    same_base: bool,
    options: Mapping[str, Any],
) -> Plan:
    """Return a merge that has been checked and not run: what a dry run prints.

    Args:
        adapters: as for `merge`, each delta (o, i).
        weights: as for `merge`.
        method: as for `merge`.
        missing: as for `merge`.
        same_base: as for `merge`.
        options: the method's keywords.

    Raises:
        ConfigError: as for `merge`.
    """
    if method not in METHODS:
        raise ConfigError(unknown_name("merge method", method, METHODS, "moa.merge.merge"))
    if missing not in ("refuse", "zero"):
        raise ConfigError(unknown_name("missing", missing, ("refuse", "zero"), "moa.merge.merge"))
    if isinstance(adapters, Mapping) or not adapters:
        raise ConfigError(
            f"merge: expected a list of adapters, got {'one mapping' if isinstance(adapters, Mapping) else 'none'}."
        )
    row = METHODS[method]
    sets = [deltas(a, source=f"adapter {position}") for position, a in enumerate(adapters)]
    values = _weights(row, weights, len(sets))
    complete = read_options(row, options)
    if same_base:
        _check_base(sets)
    _check_layout(sets)
    return Plan(row, sets, _names(sets, missing), values, complete)


def _weights(row: Method, weights: Sequence[float] | None, n: int) -> tuple[float, ...]:
    values = check_weights(weights, n, f"method {row.name!r}")
    if row.weights == "none" and weights is not None:
        raise ConfigError(f"method {row.name!r} takes no weights ({row.definition}), got {list(values)}.")
    return normalised(values, row.name) if row.weights == "normalised" else values


def _check_base(sets: Sequence[Deltas]) -> None:
    known = [(s.source, s.base) for s in sets if s.base is not None]
    for source, base in known[1:]:
        if base != known[0][1]:
            raise ConfigError(
                f"{source} changes the base {base!r}, {known[0][0]} changes {known[0][1]!r}: deltas of different bases "
                "do not add up. If the two names mean the same weights, pass same_base=False."
            )


def _check_layout(sets: Sequence[Deltas]) -> None:
    layouts = {s.transposed: s.source for s in sets if s.transposed is not None}
    if len(layouts) > 1:
        raise ConfigError(
            f"{layouts[True]} has fan_in_fan_out=True, {layouts[False]} has False: one of them is not for this base, "
            "or its configuration is wrong; square layers would be merged with one of them transposed."
        )


def _names(sets: Sequence[Deltas], missing: str) -> tuple[str, ...]:
    names = dict.fromkeys(name for s in sets for name in s)
    if not names:
        raise ConfigError("merge: the adapters hold no tensors.")
    if missing == "refuse":
        for s in sets:
            lost = [name for name in names if name not in s]
            if lost:
                raise ConfigError(
                    f"{s.source} has no delta for {listed(lost)}, which another adapter has: they were trained on "
                    "other targets or another base. Pass missing='zero' to count what is missing as no change."
                )
    return tuple(names)
