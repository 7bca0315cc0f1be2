"""The adapters of several clients, or whole mixtures, as one: expert by expert, with routers averaged or kept local."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..delta import work_dtype
from ..errors import ConfigError, ShapeError
from .aggregators import Aggregator, Factors, aggregator
from .update import Update, curved_message

ROUTER = ".router."


@dataclass(frozen=True, eq=False)
class Aggregation:
    """What the server makes of a round.

    Args:
        tensors: every trained tensor, by name, of any shape.
        residuals: by the name of a bank a change (o, i) that every client adds to its base; empty but for "fedex".
    """

    tensors: dict[str, Tensor]
    residuals: dict[str, Tensor] = field(default_factory=dict)


def aggregate(
    updates: Sequence[Update],
    method: str = "fedit",
    *,
    routers: Literal["average", "local"] = "average",
    scalings: Mapping[str, float] | None = None,
) -> Aggregation:
    """Return the server's tensors, of any shape, and what clients add to their bases.

    The factors of a bank, (E, r, i) and (E, r, o), go through the method's row, expert by expert; everything else that
    is trained (cores, heads, routers) is averaged. Sums are formed in fp32 at least.

    Args:
        updates: of clients, as `update_of` gives them; their weights are divided by their sum.
        method: a row of `AGGREGATORS`.
        routers: "local" leaves routers out: each client keeps its own.
        scalings: s of the server's factors by the name of their bank; None: the first client's.

    Raises:
        ConfigError: an update that is missing, a weight that is not positive and finite, updates of other models, an
            unknown method, frozen tensors that differ; an exact method over experts whose changes have no exact mean; a
            residual for several experts, which no base could hold.
        ShapeError: tensors of other shapes where the method takes none.
    """
    row = aggregator(method)
    if routers not in ("average", "local"):
        raise ConfigError(f"routers must be 'average' or 'local', got {routers!r}.")
    if not updates:
        raise ConfigError("there is an update of 0 clients: aggregate at least one.")
    for number, update in enumerate(updates):
        if not (math.isfinite(update.weight) and update.weight > 0):
            raise ConfigError(f"client {number}: a weight must be positive and finite, got {update.weight}.")
    first = updates[0]
    _check_alike(updates)
    if row.exact and first.curved:
        raise ConfigError(curved_message(method, *next(iter(first.curved.items()))))
    total = math.fsum(update.weight for update in updates)
    shares = [update.weight / total for update in updates]
    out = Aggregation({})
    for bank, scaling in first.scalings.items():
        server = scaling if scalings is None else scalings[bank]
        _aggregate_factors(bank, updates, shares, row, server, out)
    sides = {f"{bank}.{side}" for bank in first.scalings for side in ("down", "up")}
    for name in first.tensors:
        if name in first.trained - sides and not (routers == "local" and ROUTER in name):
            out.tensors[name] = _mean(name, [update.tensors[name] for update in updates], shares)
    return out


def _aggregate_factors(
    bank: str, updates: Sequence[Update], shares: Sequence[float], row: Aggregator, scaling: float, out: Aggregation
) -> None:
    """Put one bank's factors (E, r, i) and (E, r, o), and its residual (o, i), into the result."""
    names = f"{bank}.down", f"{bank}.up"
    trained = [name for name in names if name in updates[0].trained]
    if not trained:
        return
    dtype = work_dtype(updates[0].tensors[names[0]].dtype)
    clients = [Factors(u.tensors[names[0]].to(dtype), u.tensors[names[1]].to(dtype), u.scalings[bank]) for u in updates]
    try:
        result = row.run(clients, shares)
    except (ConfigError, ShapeError) as error:
        raise type(error)(f"{bank}: {error}") from error
    factors = result.factors
    # the side that trains takes up what the server's s lacks
    moved = names[1] if names[1] in trained else names[0]
    for name, tensor in zip(names, (factors.down, factors.up), strict=True):
        if name in trained:
            ratio = factors.scaling / scaling if name == moved else 1.0
            out.tensors[name] = (tensor * ratio).to(updates[0].tensors[name].dtype)
    if result.residual is not None:
        if len(result.residual) > 1:
            raise ConfigError(
                f"{bank}: {row.name} leaves a residual for each of {len(result.residual)} experts, and a base holds "
                "one: 'flora' is exact for mixtures."
            )
        out.residuals[bank] = result.residual[0]


def _check_alike(updates: Sequence[Update]) -> None:
    """Raise where updates are of other models, or what all share is not the same."""
    kept: list[tuple[Callable[[Update], Mapping[str, Any]], str]] = [
        (lambda u: u.tensors, "has"),
        (lambda u: dict.fromkeys(u.trained), "trains"),
        (lambda u: u.scalings, "has factors in"),
        (lambda u: u.constants, "has"),
    ]
    first = updates[0]
    for number, update in enumerate(updates[1:], 1):
        for what, verb in kept:
            other = sorted(what(first).keys() ^ what(update).keys())
            if other:
                raise ConfigError(
                    f"client {number} has another model than client 0: only one of them {verb} {other[0]!r}."
                )
        for name, digest in first.constants.items():
            if update.constants[name] != digest:
                raise ConfigError(_frozen_message(number, name))
        for name in first.tensors.keys() - first.trained:
            if not torch.equal(first.tensors[name], update.tensors[name].to(first.tensors[name].device)):
                raise ConfigError(_frozen_message(number, name))


def _frozen_message(number: int, name: str) -> str:
    return (
        f"client {number}: {name} is frozen, and is not what client 0 has: build every client's model from one base, "
        "by one seed, or load it from the server's checkpoint."
    )


def _mean(name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    first = tensors[0]
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ShapeError(f"{name} has shapes {[tuple(tensor.shape) for tensor in tensors]} and cannot be averaged.")
    if not first.is_floating_point():
        if not all(torch.equal(first, tensor) for tensor in tensors):
            raise ConfigError(f"{name} holds whole numbers ({first.dtype}) that differ and cannot be averaged.")
        return first.clone()
    parts = [share * tensor.to(work_dtype(first.dtype)) for share, tensor in zip(shares, tensors, strict=True)]
    return torch.stack(parts).sum(0).to(first.dtype)
