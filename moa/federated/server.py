"""The server's side of a round, whatever carries the messages: what clients get, what is taken of what they send."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .aggregate import ROUTER, Aggregation, aggregate
from .aggregators import Factors, aggregator
from .screening import Reply, Screen
from .update import Update, prepare, update_of


@dataclass(frozen=True, eq=False)
class Download:
    """What every client gets at the start of a round.

    Args:
        tensors: trained ones, by name, of any shape, at the server's rank.
        residuals: by the name of a bank, what has been added to its base since the first round, (o, i).
        scalings: by the name of a bank with factors, the server's s.
    """

    tensors: dict[str, Tensor]
    residuals: dict[str, Tensor]
    scalings: dict[str, float]

    def bytes(self) -> int:
        """Return the size of its tensors."""
        return size_of(self.tensors) + size_of(self.residuals)


@dataclass(frozen=True)
class Round:
    """What happened in a round.

    Args:
        number: from 1.
        taken: clients whose replies were taken.
        refused: why another's was not, by client.
        vanished: clients that were asked and did not answer.
        changed: there were enough of them, and the server's adapters are new.
        down_bytes: of tensors sent to all clients.
        up_bytes: of tensors that came from those that were taken.
    """

    number: int
    taken: tuple[Hashable, ...]
    refused: dict[Hashable, str]
    vanished: tuple[Hashable, ...]
    changed: bool
    down_bytes: int
    up_bytes: int


class Server:
    """The adapters that clients train together.

    Args:
        model: as the first round begins; its values are read, it is not trained. With ranks of their own, the largest.
        method: a row of `AGGREGATORS`.
        routers: "average", or "local": each client keeps its own.
        min_clients: of a round; with fewer the adapters stay as they are.
        screen: limits of what is taken.

    Raises:
        ConfigError: an unknown method, or one that these experts do not fit; a method that adds to the base, over
            several experts, which no base could hold; fewer than 1 client.
    """

    def __init__(
        self,
        model: MoAModel,
        method: str = "fedit",
        *,
        routers: Literal["average", "local"] = "average",
        min_clients: int = 1,
        screen: Screen | None = None,
    ) -> None:
        if isinstance(min_clients, bool) or not isinstance(min_clients, int) or min_clients < 1:
            raise ConfigError(f"min_clients must be a whole number of at least 1, got {min_clients!r}.")
        if routers not in ("average", "local"):
            raise ConfigError(f"routers must be 'average' or 'local', got {routers!r}.")
        self.row, self.routers, self.min_clients = aggregator(method), routers, min_clients
        self.screen = screen or Screen()
        known = update_of(prepare(model, method))
        self._adapters = dataclasses.replace(known, tensors={n: t.clone() for n, t in known.tensors.items()})
        self._start = dict(self._adapters.tensors)
        if self.row.residual or self.row.restarts:
            for bank in known.scalings:
                if len(known.tensors[f"{bank}.down"]) > 1:
                    raise ConfigError(
                        f"{bank}: clients of {method!r} add to their bases, which hold one expert and not "
                        f"{len(known.tensors[f'{bank}.down'])}: 'flexlora' is for mixtures with ranks of their own, "
                        "'fedit' for those of one rank."
                    )
        kept = {name for name in known.trained if routers == "local" and ROUTER in name}
        self.names = frozenset(known.trained - kept)
        self.residuals: dict[str, Tensor] = {}
        self.rounds: list[Round] = []

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The adapters as they are now: trained tensors by name, of any shape."""
        return {name: self._adapters.tensors[name] for name in sorted(self.names)}

    def download(self) -> Download:
        """Return what every client gets, tensors of any shape."""
        return Download(self.tensors, self.residuals, dict(self._adapters.scalings))

    def why_not(self, reply: Reply) -> str | None:
        """Return why a reply, tensors of any shape, is refused, or None."""
        return self.screen.why_not(reply, self._adapters, self.names, self.row)

    @torch.no_grad()
    def finish(self, replies: Mapping[Hashable, Reply | str], asked: Sequence[Hashable]) -> Round:
        """Take what came back, tensors of any shape, and return what happened; a bad reply never ends a round.

        Args:
            replies: by client, or a client's error in words.
            asked: the clients that were sent a download.
        """
        refused: dict[Hashable, str] = {}
        taken: dict[Hashable, Reply] = {}
        for client, reply in replies.items():
            reason = reply if isinstance(reply, str) else self.why_not(reply)
            if client not in asked:
                reason = "it was not asked in this round"
            if reason is None and isinstance(reply, Reply):
                taken[client] = reply
            else:
                refused[client] = str(reason)
        down = self.download().bytes() * len(asked)
        changed = len(taken) >= self.min_clients
        if changed:
            updates = [self._update(reply) for reply in taken.values()]
            found = aggregate(updates, self.row.name, routers=self.routers, scalings=self._adapters.scalings)
            self._settle(found)
        done = Round(
            len(self.rounds) + 1,
            tuple(taken),
            refused,
            tuple(client for client in asked if client not in replies),
            changed,
            down,
            sum(size_of(reply.tensors) for reply in taken.values()),
        )
        self.rounds.append(done)
        return done

    def _update(self, reply: Reply) -> Update:
        device = {name: known.device for name, known in self._adapters.tensors.items()}
        sent = {name: tensor.detach().to(device[name]) for name, tensor in reply.tensors.items()}
        tensors = {**self._adapters.tensors, **sent}
        return dataclasses.replace(
            self._adapters, tensors=tensors, weight=float(reply.examples), scalings=dict(reply.scalings)
        )

    def _settle(self, found: Aggregation) -> None:
        """Make a round's result the server's adapters, of the server's rank, and add up what bases take."""
        tensors = dict(found.tensors)
        for bank, scaling in self._adapters.scalings.items():
            down, up = f"{bank}.down", f"{bank}.up"
            if self.row.restarts:
                self._add(bank, Factors(tensors[down], tensors[up], scaling).dense()[0])
            for name in (down, up):
                known = self._adapters.tensors[name]
                if self.row.restarts:
                    tensors[name] = torch.zeros_like(known) if name == up else self._start[name]
                elif name in tensors:
                    tensors[name] = F.pad(tensors[name], (0, 0, 0, known.shape[1] - tensors[name].shape[1]))
        for bank, residual in found.residuals.items():
            self._add(bank, residual)
        self._adapters = dataclasses.replace(self._adapters, tensors={**self._adapters.tensors, **tensors})

    def _add(self, bank: str, change: Tensor) -> None:
        old = self.residuals.get(bank)
        self.residuals[bank] = change if old is None else old + change


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors, of any shape."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def weighted_mean(rows: Sequence[Mapping[str, object]], weights: Sequence[float]) -> dict[str, float]:
    """Return the mean of what every client measured; no tensors. What one left out, or NaN, is left out.

    Args:
        rows: of clients, name -> number.
        weights: of clients, positive.
    """
    found = {}
    for name in rows[0] if rows else ():
        values = [row.get(name) for row in rows]
        if all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            parts = [w * float(v) for w, v in zip(weights, values, strict=True)]  # type: ignore[arg-type]
            found[name] = math.fsum(parts) / math.fsum(weights)
    return found
