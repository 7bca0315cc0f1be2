"""Runs in Flower's environment: rounds of the strategy with clients in this process, some of which misbehave."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from flwr.app import Array, Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import moa
from moa.federated import Server, prepare
from moa.federated.flower import ARRAYS, METRICS, AdapterStrategy, client_app, from_record, to_record
from tests import models

METHOD, ROUTER, SPOILED, VANISHED = "flexlora", "topk", 2, 3


class Here(Grid):
    """A grid of five clients in this process: messages are answered at once, by the app itself."""

    def __init__(self, app: Any, spoil: str) -> None:
        self.app, self.spoil = app, spoil
        self.contexts = {n: Context(1, n, {"partition-id": n - 1}, RecordDict(), {}) for n in range(1, 6)}

    run = None

    def set_run(self, run: Any) -> None:
        """Not used here."""

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used here."""
        raise NotImplementedError

    def get_node_ids(self) -> Any:
        """The five clients."""
        return list(self.contexts)

    def push_messages(self, messages: Any) -> Any:
        """Not used here."""
        raise NotImplementedError

    pull_messages = push_messages

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
        """Return every client's answer, but that of the one that vanishes while it trains."""
        return [self.answer(m) for m in messages if not (self.spoil and m.metadata.dst_node_id == VANISHED)]

    def answer(self, message: Message) -> Message:
        """Return a client's answer, spoiled where it is the one that misbehaves."""
        node = message.metadata.dst_node_id
        found = self.app(message, self.contexts[node])
        if node != SPOILED or not self.spoil or message.metadata.message_type != "train":
            return found
        name = next(n for n in found.content[ARRAYS] if n.endswith("bank.down"))
        array = found.content[ARRAYS][name]
        if self.spoil == "nan":
            tensor = from_record(found.content[ARRAYS])[name]
            found.content[ARRAYS][name] = Array((tensor * float("nan")).numpy())
        elif self.spoil == "pickle":
            found.content[ARRAYS][name] = Array(array.dtype, array.shape, "numpy.ndarray", b"\x80\x04cos\nsystem\n.")
        elif self.spoil == "long":
            found.content[ARRAYS][name] = Array(array.dtype, array.shape, array.stype, array.data * 10_000)
        elif self.spoil == "nothing":
            del found.content[ARRAYS]
        elif self.spoil == "error":
            return Message(Error(0, "out of memory"), reply_to=message)
        elif self.spoil == "metrics":
            del found.content[METRICS]
        return found


def build(context: Context | None, config: Any = None) -> Any:
    """Return a client's model, of a rank of its own, or the server's."""
    base = models.bert()
    torch.manual_seed(0)
    rank = 4 if context is None else 2 + context.node_id % 3
    return prepare(moa.build(base, ROUTER, n_experts=3, k=2, rank=rank), METHOD)


def train(model: Any, context: Context, config: Any) -> tuple[int, dict[str, float]]:
    """Move every trained parameter by the client's number."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.01 * context.node_id
    return 10 * context.node_id, {"loss": float(context.node_id)}


def rounds(spoil: str, routers: str, min_clients: int = 1) -> dict[str, Any]:
    """Return what two rounds of Flower made."""
    server = Server(build(None), METHOD, routers=routers, min_clients=min_clients)
    strategy = AdapterStrategy(server, min_available_nodes=5, min_train_nodes=5, min_evaluate_nodes=5)
    grid = Here(client_app(build, train, train), spoil)
    result = strategy.start(grid, strategy.arrays(), num_rounds=2)
    tensors = {n: t.double().sum().item() for n, t in server.tensors.items()}
    sent = from_record(result.arrays) if result.arrays else {}
    return {
        "sums": tensors,
        "same": all(torch.equal(sent[n], t) for n, t in server.tensors.items()) if sent else None,
        "rounds": [[r.taken, r.refused, r.vanished, r.changed, r.down_bytes, r.up_bytes] for r in server.rounds],
        "loss": {k: dict(v) for k, v in result.train_metrics_clientapp.items()},
        "evaluated": {k: dict(v) for k, v in result.evaluate_metrics_clientapp.items()},
        "local": [sorted(from_record(c.state["moa-own"])) for c in grid.contexts.values() if "moa-own" in c.state],
    }


def main() -> None:
    """Print the rounds of every kind of client as JSON."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    half = {"a": torch.randn(3, 2).bfloat16(), "b": torch.arange(3), "c": torch.randn(2).double()}
    back = from_record(to_record(half))
    found: dict[str, Any] = {kind: rounds(kind, "average") for kind in json.loads(sys.argv[1])}
    found["local"] = rounds("", "local")
    found["few"] = rounds("nan", "average", min_clients=4)
    found["bits"] = all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in half.items())
    print("RESULT" + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
