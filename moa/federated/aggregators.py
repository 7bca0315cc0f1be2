"""The table of aggregators: clients' low-rank factors to the server's.

What clients mean together is Σ_k p_k s_k B_k A_k. An aggregator is exact where its result is that; a mean of factors is
not, as the product of means is not the mean of products.

Factors have leading axes, as those of experts, which stay apart: down (*, r, i), up (*, r, o).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError, unknown_name


@dataclass(frozen=True, eq=False)
class Factors:
    """What one client has trained in one layer: s · upᵀ down.

    Args:
        down: (*, r, i).
        up: (*, r, o).
        scaling: s.
    """

    down: Tensor
    up: Tensor
    scaling: float = 1.0

    def dense(self) -> Tensor:
        """Return the change (*, o, i)."""
        return self.scaling * self.up.mT @ self.down


@dataclass(frozen=True, eq=False)
class Aggregated:
    """What the server gives back.

    Args:
        factors: that every client goes on with.
        residual: (*, o, i) to be added to every client's base, or None.
    """

    factors: Factors
    residual: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the whole change (*, o, i)."""
        found = self.factors.dense()
        return found if self.residual is None else found + self.residual


Form = Callable[[Sequence[Factors], Sequence[float]], Aggregated]
Side = Literal["down", "up"]


@dataclass(frozen=True)
class Aggregator:
    """One row of the table.

    Args:
        name: in the table.
        form: clients' factors of one layer, and their weights p, which add up to 1.
        exact: the result is Σ p s B A.
        ranks: clients may have ranks of their own.
        source: paper.
        frozen: the side of the factors that clients do not train.
        residual: the result has a part that only a base can hold.
        restarts: clients add the whole result to their bases, and begin anew.
    """

    name: str
    form: Form
    exact: bool
    ranks: bool
    source: str
    frozen: Side | None = None
    residual: bool = False
    restarts: bool = False

    def run(self, clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
        """Return the server's factors (*, r, i), (*, r, o).

        Raises:
            ShapeError: ranks that differ, where the row does not take them.
            ConfigError: sides that should be frozen differ.
        """
        if not self.ranks:
            _check_ranks(clients, self.name)
        return self.form(clients, weights)


def mean_of_products(clients: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    """Return Σ p s B A, (*, o, i): what an exact aggregator gives."""
    return torch.stack([p * client.dense() for p, client in zip(weights, clients, strict=True)]).sum(0)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([p * tensor for p, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _fedit(clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
    scaling = clients[0].scaling
    up = _mean([client.up * (client.scaling / scaling) for client in clients], weights)
    return Aggregated(Factors(_mean([client.down for client in clients], weights), up, scaling))


def _one_sided(side: Side, advice: str) -> Form:
    def form(clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
        first = getattr(clients[0], side)
        if not all(torch.equal(getattr(client, side), first) for client in clients):
            raise ConfigError(f"only one side is averaged, and the clients' {side} factors are not the same: {advice}.")
        if side == "down":
            up = _mean([client.up * (client.scaling / clients[0].scaling) for client in clients], weights)
            return Aggregated(Factors(first, up, clients[0].scaling))
        down = _mean([client.down * (client.scaling / clients[0].scaling) for client in clients], weights)
        return Aggregated(Factors(down, first, clients[0].scaling))

    return form


def _zero_pad(clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
    most = max(client.down.shape[-2] for client in clients)

    def padded(tensor: Tensor) -> Tensor:
        return F.pad(tensor, (0, 0, 0, most - tensor.shape[-2]))

    return _fedit([Factors(padded(c.down), padded(c.up), c.scaling) for c in clients], weights)


def _fedex(clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
    mean = _fedit(clients, weights).factors
    return Aggregated(mean, mean_of_products(clients, weights) - mean.dense())


def _flexlora(clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
    stacked = _flora(clients, weights).factors
    return Aggregated(cut(stacked, max(client.down.shape[-2] for client in clients)))


def _flora(clients: Sequence[Factors], weights: Sequence[float]) -> Aggregated:
    scaling = clients[0].scaling
    ups = [client.up * (p * client.scaling / scaling) for p, client in zip(weights, clients, strict=True)]
    return Aggregated(Factors(torch.cat([client.down for client in clients], -2), torch.cat(ups, -2), scaling))


def cut(factors: Factors, rank: int) -> Factors:
    """Return the nearest factors (*, r, i), (*, r, o) of at most a rank, largest singular value first.

    B A = U Σ Vᵀ by QR of both factors and SVD of the core; up = √Σ Uᵀ, down = √Σ Vᵀ: any first rows are the nearest
    change of that rank.

    Source: Eckart and Young 1936; FlexLoRA, arXiv 2402.11505, §3.2.
    """
    q_down, r_down = torch.linalg.qr(factors.down.mT)  # (*, i, q), (*, q, r)
    q_up, r_up = torch.linalg.qr(factors.up.mT)
    u, values, v = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)  # (*, q, q'), (*, q'), (*, q', q)
    root = values[..., :rank].sqrt().unsqueeze(-2)
    down = ((q_down @ v.mT[..., :rank]) * root).mT
    up = ((q_up @ u[..., :rank]) * root).mT
    missing = rank - down.shape[-2]  # a layer narrower than the rank
    return Factors(F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, 0, 0, missing)), factors.scaling)


AGGREGATORS = {
    row.name: row
    for row in (
        Aggregator("fedit", _fedit, exact=False, ranks=False, source="Zhang et al. 2023, arXiv 2305.05644"),
        Aggregator("zero_pad", _zero_pad, exact=False, ranks=True, source="Cho et al. 2024, arXiv 2401.06432"),
        Aggregator("flexlora", _flexlora, exact=False, ranks=True, source="Bai et al. 2024, arXiv 2402.11505"),
        Aggregator("flora", _flora, exact=True, ranks=True, restarts=True, source="Wang et al. 2024, arXiv 2409.05976"),
        Aggregator(
            "fedex",
            _fedex,
            exact=True,
            ranks=False,
            residual=True,
            source="Singhal et al. 2024, arXiv 2410.09432",
        ),
        Aggregator(
            "ffa",
            _one_sided("down", "freeze them, as `prepare(model, 'ffa')` does"),
            exact=True,
            ranks=False,
            frozen="down",
            source="Sun et al. 2024, arXiv 2403.12313",
        ),
        Aggregator(
            "fedsb",
            _one_sided("up", "Fed-SB trains cores between bases that all share: build with expert='core'"),
            exact=True,
            ranks=False,
            frozen="up",
            source="Singhal et al. 2025, arXiv 2502.15436",
        ),
    )
}


def aggregator(name: str) -> Aggregator:
    """Return the row of a name; no tensors.

    Raises:
        ConfigError: there is none; the nearest is named.
    """
    if name not in AGGREGATORS:
        raise ConfigError(unknown_name("aggregator", name, AGGREGATORS))
    return AGGREGATORS[name]


def _check_ranks(clients: Sequence[Factors], name: str) -> None:
    shapes = {(tuple(client.down.shape), tuple(client.up.shape)) for client in clients}
    if len(shapes) > 1:
        raise ShapeError(
            f"{name} takes the mean of factors, and the clients' have shapes {sorted(shapes)}: 'flora' stacks factors "
            "of any rank, 'flexlora' cuts the stack, 'zero_pad' fills them up."
        )
