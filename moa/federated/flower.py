"""Mixtures trained on Flower: a strategy for its ServerApp, and an app for its clients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from flwr.supercore import log
from torch import Tensor

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .client import received, reply_of
from .screening import Reply
from .server import Download, Server, weighted_mean
from .update import prepare, update_of

EXAMPLES = "num-examples"  # Flower's word
ARRAYS, CONFIG, METRICS, OWN = "arrays", "config", "metrics", "moa-own"
RESIDUAL = "residual."
WARNING = 30

Build = Callable[[Context, ConfigRecord], MoAModel]
Step = Callable[[MoAModel, Context, ConfigRecord], tuple[int, Mapping[str, float]]]


class AdapterStrategy(FedAvg):
    """Flower's rounds with the server's aggregators: sampling and waiting are FedAvg's, everything else is `Server`'s.

    Args:
        server: what is aggregated, how, and what is taken; `server.rounds` says afterwards what happened.
        options: of FedAvg, e.g. fraction_train, min_available_nodes.
    """

    def __init__(self, server: Server, **options: Any) -> None:
        super().__init__(weighted_by_key=EXAMPLES, arrayrecord_key=ARRAYS, configrecord_key=CONFIG, **options)
        self.server = server
        self._asked: list[int] = []

    def arrays(self) -> ArrayRecord:
        """Return what `start` begins with, and what every client gets: tensors of any shape."""
        download = self.server.download()
        residuals = {RESIDUAL + name: tensor for name, tensor in download.residuals.items()}
        return to_record({**download.tensors, **residuals})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message a client, with tensors of any shape."""
        messages = list(super().configure_train(server_round, arrays, self._with_scales(config), grid))
        self._asked = [message.metadata.dst_node_id for message in messages]
        return messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return one message a client, with tensors of any shape."""
        return super().configure_evaluate(server_round, arrays, self._with_scales(config), grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the server's tensors, of any shape, or None where a round had too few clients."""
        read, measured = {}, {}
        # by node and not by arrival, so that a round's sums have one order
        for message in sorted(replies, key=lambda message: message.metadata.src_node_id):
            node = message.metadata.src_node_id
            read[node], measured[node] = self._read(message)
        done = self.server.finish(read, self._asked)
        for node, reason in done.refused.items():
            log(WARNING, "round %s: client %s is left out: %s", done.number, node, reason)
        for node in done.vanished:
            log(WARNING, "round %s: client %s vanished", done.number, node)
        if not done.changed:
            log(WARNING, "round %s: %s clients, and at least %s are needed: the adapters stay", done.number,
                len(done.taken), self.server.min_clients)  # fmt: skip
            return None, None
        rows = [measured[node] for node in done.taken]
        return self.arrays(), MetricRecord(weighted_mean(rows, [row[EXAMPLES] for row in rows]))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of what clients measured, weighted by their examples; no tensors."""
        rows = [_numbers(message) for message in replies if not message.has_error()]
        rows = [row for row in rows if 0 < row.get(EXAMPLES, 0) <= self.server.screen.most_examples]
        return MetricRecord(weighted_mean(rows, [row[EXAMPLES] for row in rows])) if rows else None

    def _with_scales(self, config: ConfigRecord) -> ConfigRecord:
        names = sorted(self.server.download().scalings)
        config["moa-banks"], config["moa-scalings"] = names, [self.server.download().scalings[n] for n in names]
        config["moa-method"] = self.server.row.name
        return config

    def _read(self, message: Message) -> tuple[Reply | str, dict[str, float]]:
        """Return a client's reply, or in words why it cannot be read, and what it measured."""
        if message.has_error():
            return message.error.reason or f"error {message.error.code}", {}
        numbers = _numbers(message)
        try:
            arrays, config = message.content[ARRAYS], message.content[CONFIG]
            most = self.server.download().bytes()
            tensors = from_record(arrays, most)
            scalings = dict(zip(config["moa-banks"], config["moa-scalings"], strict=True))
            found = Reply(tensors, numbers.get(EXAMPLES, 0), scalings, str(config["moa-fingerprint"]))
        except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
            return f"its message cannot be read: {error}", {}
        return found, numbers


def client_app(build: Build, train: Step, evaluate: Step | None = None) -> ClientApp:
    """Return a Flower client that trains a mixture, (B, S) -> its outputs; local routers stay with it.

    Args:
        build: makes the model of a node from Flower's context and the server's configuration, anew for each message;
            every client's and the server's are built from one base and, where something is drawn, by one seed.
            `prepare` is called on it.
        train: trains it in place, and returns how many examples, and what it measured.
        evaluate: the same without training; None: there is no evaluation.
    """
    app = ClientApp()

    def run(message: Message, context: Context, step: Step, training: bool) -> Message:
        config = message.content[CONFIG]
        model = prepare(build(context, config), str(config["moa-method"]))
        if OWN in context.state:
            _load_own(model, from_record(context.state[OWN]))
        tensors = from_record(message.content[ARRAYS])
        names = frozenset(name for name in tensors if not name.startswith(RESIDUAL))
        residuals = {n.removeprefix(RESIDUAL): t for n, t in tensors.items() if n not in names}
        scalings = dict(zip(config["moa-banks"], config["moa-scalings"], strict=True))
        with received(model, Download({n: tensors[n] for n in names}, residuals, scalings)):
            examples, measured = step(model, context, config)
            found = RecordDict({METRICS: MetricRecord({**measured, EXAMPLES: examples})})
            if training:
                reply = reply_of(model, examples, names)
                banks = sorted(reply.scalings)
                found[ARRAYS] = to_record(reply.tensors)
                found[CONFIG] = ConfigRecord(
                    {
                        "moa-banks": banks,
                        "moa-scalings": [reply.scalings[bank] for bank in banks],
                        "moa-fingerprint": reply.fingerprint,
                    }
                )
                own = update_of(model).sent()
                context.state[OWN] = to_record({n: t for n, t in own.items() if n not in names})
        return Message(content=found, reply_to=message)

    app.train()(partial(run, step=train, training=True))
    if evaluate is not None:
        app.evaluate()(partial(run, step=evaluate, training=False))
    return app


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors of any shape as Flower's record; bf16, which NumPy does not have, as the integers of its bits."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            record[name] = Array(tensor.cpu().view(torch.int16).numpy())
            record[name].dtype = "bfloat16"
        else:
            record[name] = Array(tensor.cpu().numpy())
    return record


def from_record(record: ArrayRecord, most: int | None = None) -> dict[str, Tensor]:
    """Return the tensors, of any shape, of Flower's record; nothing in it is run.

    Args:
        record: from another machine.
        most: bytes that it may have, beside a header for each tensor; None: any number.

    Raises:
        ConfigError: more bytes than that, or an array that cannot be read, by name.
    """
    came = sum(len(array.data) for array in record.values())
    if most is not None and came > most + 1024 * len(record):
        raise ConfigError(f"{came} bytes came, expected at most {most}.")
    found = {}
    for name, array in record.items():
        try:
            tensor = torch.from_numpy(array.numpy())
            found[name] = tensor.view(torch.bfloat16) if array.dtype == "bfloat16" else tensor
        except (TypeError, ValueError, RuntimeError, EOFError, MemoryError) as error:
            raise ConfigError(f"{name} cannot be read: {error}") from error
    return found


@torch.no_grad()
def _load_own(model: MoAModel, tensors: Mapping[str, Tensor]) -> None:
    """Load what this node kept, tensors of any shape; what it kept of another model, of an earlier study, is left."""
    known = update_of(model).tensors
    if all(name in known and known[name].shape == tensor.shape for name, tensor in tensors.items()):
        for name, tensor in tensors.items():
            known[name].copy_(tensor)


def _numbers(message: Message) -> dict[str, float]:
    """Return the finite numbers that a client measured."""
    record = message.content.get(METRICS)
    rows = dict(record) if isinstance(record, MetricRecord) else {}
    return {k: float(v) for k, v in rows.items() if isinstance(v, int | float) and math.isfinite(v)}
