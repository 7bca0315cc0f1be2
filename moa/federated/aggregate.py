"""The states of clients' adapters, or whole mixtures, as one: expert by expert, with routers averaged or kept local."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from .aggregators import Factors, aggregator

DOWN, UP, ROUTER = ".bank.down", ".bank.up", ".router."
State = Mapping[str, Tensor]


def aggregate_states(
    states: Sequence[State],
    weights: Sequence[float],
    method: str = "fedit",
    *,
    routers: Literal["average", "local"] = "average",
    scales: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the server's state of adapters, and what clients add to their bases.

    Pairs of factors, (E, r, i) and (E, r, o), go through the method's row, expert by expert; everything else that is
    trained (cores, heads, routers) is averaged.

    Args:
        states: of clients, as `model.adapter_state_dict()` gives them.
        weights: of clients, e.g. how many examples each has; they are divided by their sum.
        method: a row of `AGGREGATORS`.
        routers: "local" leaves routers out: each client keeps its own.
        scales: alpha / r of each client's adapters; the result has the first one's. None: all alike.

    Returns:
        State of the factors and all else by name, and by the name of a layer's bank a residual (o, i): empty
        but for "fedex".

    Raises:
        ConfigError: no client, weights that are not positive, states of other models, an unknown method; a residual for
            several experts, which no base could hold.
        ShapeError: factors of other shapes where the method takes none.
    """
    row = aggregator(method)
    if not states or len(states) != len(weights) or (scales is not None and len(scales) != len(states)):
        raise ConfigError(f"each client has a state, a weight and a scale; there are {len(states)} and {len(weights)}.")
    if min(weights) <= 0:
        raise ConfigError(f"clients' weights must be positive, got {min(weights)}.")
    if routers not in ("average", "local"):
        raise ConfigError(f"routers must be 'average' or 'local', got {routers!r}.")
    shares = [weight / sum(weights) for weight in weights]
    names = _common(states)
    found, residuals = {}, {}
    for name in names:
        if name.endswith(UP) or (routers == "local" and ROUTER in name):
            continue
        if not name.endswith(DOWN):
            found[name] = _mean(name, [state[name] for state in states], shares)
            continue
        bank, up = name.removesuffix(".down"), name.removesuffix(DOWN) + UP
        clients = [
            Factors(state[name], state[up], 1.0 if scales is None else scales[n]) for n, state in enumerate(states)
        ]
        result = row.run(clients, shares)
        found[name], found[up] = result.factors.down, result.factors.up
        if result.residual is not None:
            if len(result.residual) > 1:
                raise ConfigError(
                    f"{bank}: {method} leaves a residual for each of {len(result.residual)} experts, and a base holds "
                    "one: 'flora' is exact for mixtures."
                )
            residuals[bank] = result.residual[0]
    return found, residuals


def upload_bytes(state: State, names: Iterable[str] | None = None) -> int:
    """Return what a client sends of its state, tensors of any shape, in bytes; names choose some of it."""
    chosen = state.keys() if names is None else names
    return sum(state[name].numel() * state[name].element_size() for name in chosen)


def _common(states: Sequence[State]) -> list[str]:
    first = states[0].keys()
    for number, state in enumerate(states):
        if state.keys() != first:
            other = sorted(first ^ state.keys())[0]
            raise ConfigError(f"client {number} has another model than client 0: only one of them has {other!r}.")
    return list(first)


def _mean(name: str, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ShapeError(f"{name} has shapes {[tuple(tensor.shape) for tensor in tensors]} and no mean.")
    if not tensors[0].is_floating_point():
        return tensors[0]
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    mean = sum(share * tensor.to(wide) for share, tensor in zip(shares, tensors, strict=True))
    assert isinstance(mean, Tensor)
    return mean.to(tensors[0].dtype)
