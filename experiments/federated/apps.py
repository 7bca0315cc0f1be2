"""What runs on the server and on each client: a study of aggregators, one after the other, over the same clients."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

import moa
from experiments.federated.tasks import Rows, base, is_real, rows, split
from moa.federated import Server, prepare
from moa.federated.flower import AdapterStrategy, client_app
from moa.model.moa_model import MoAModel

RANK = 16
RANKS = [16, 16, 8, 8, 8, 4, 4, 4, 2, 2]  # of clients, where a method takes ranks of their own
ALPHA = 0.3  # of the Dirichlet split
MIXTURE = {"router": "topk", "n_experts": 4, "k": 2}
# name -> method, recipe, how routers are shared, whether clients have ranks of their own
ARMS: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "fedit": ("fedit", {}, "average", False),
    "ffa": ("ffa", {}, "average", False),
    "fedex": ("fedex", {}, "average", False),
    "zero_pad": ("zero_pad", {}, "average", True),
    "flora": ("flora", {}, "average", True),
    "flexlora": ("flexlora", {}, "average", True),
    "flexlora mixture": ("flexlora", MIXTURE, "local", True),
    "fedsb": ("fedsb", {"expert": "core"}, "average", False),
}


def settings() -> dict[str, Any]:
    """Return the study's settings, which its command leaves in the environment for every process."""
    return json.loads(os.environ["MOA_FEDERATED"])


def build(context: Context | None, config: ConfigRecord) -> MoAModel:
    """Return a client's model for an arm, or the server's."""
    method, recipe, _, own_ranks = ARMS[str(config["arm"])]
    torch.set_num_threads(1)  # on both sides: bases that are derived from a weight are compared bit for bit
    options = {"router": "fixed", "n_experts": 1, "targets": ("query", "value"), **recipe}
    rank = RANKS[client(context) % len(RANKS)] if own_ranks and context is not None else RANK
    plain = base()
    torch.manual_seed(0)  # every client's factors begin alike
    made = moa.build(plain, rank=rank, alpha=2 * rank, modules_to_save=["classifier"], **options)
    return prepare(made, method)


def client(context: Context) -> int:
    """Return a client's number."""
    return int(context.node_config["partition-id"])


def own_rows(context: Context) -> Rows:
    """Return a client's examples."""
    every = rows("train", settings()["examples"])
    return every.at(split(every.labels.tolist(), settings()["clients"], ALPHA)[client(context)])


def train(model: MoAModel, context: Context, config: ConfigRecord) -> tuple[int, dict[str, float]]:
    """Train on a client's examples for a few steps."""
    torch.set_num_threads(1)
    torch.manual_seed(1000 * int(config["server-round"]) + client(context))
    data, losses = own_rows(context), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=float(config["lr"]))
    model.train()
    for _ in range(settings()["steps"]):
        places = torch.randperm(len(data.labels))[: settings()["batch"]]
        loss = model(**data.batch(places)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return len(data.labels), {"loss": sum(losses) / len(losses)}


@torch.no_grad()
def evaluate(model: MoAModel, context: Context, config: ConfigRecord) -> tuple[int, dict[str, float]]:
    """Measure a client's model on the shared examples that nobody trains on."""
    torch.set_num_threads(1)
    model.eval()
    data = rows("eval", settings()["held_out"])
    found = model(**data.batch(torch.arange(len(data.labels)))).logits.argmax(-1)
    return len(own_rows(context).labels), {"accuracy": (found == data.labels).float().mean().item()}


def study(grid: Grid) -> dict[str, Any]:
    """Run every arm over the clients, and return what each measured."""
    given, arms = settings(), {}
    labels = rows("train", given["examples"]).labels.tolist()
    parts = split(labels, given["clients"], ALPHA)
    for arm in given["arms"]:
        method, _, routers, own_ranks = ARMS[arm]
        config = ConfigRecord({"arm": arm, "lr": 1e-2 if method == "fedsb" else 2e-3})
        server = Server(build(None, config), method, routers=routers, min_clients=min(2, given["clients"]))
        least = given["clients"]
        strategy = AdapterStrategy(
            server, min_available_nodes=least, min_train_nodes=least, min_evaluate_nodes=2, fraction_evaluate=0.2
        )
        begun = time.perf_counter()
        result = strategy.start(
            grid,
            strategy.arrays(),
            num_rounds=given["rounds"],
            timeout=given["timeout"],
            train_config=config,
            evaluate_config=ConfigRecord(dict(config)),
        )
        arms[arm] = {
            "exact": server.row.exact,
            "ranks": RANKS[:least] if own_ranks else [RANK] * least,
            "layers": len(dict(build(None, config).mixtures())),
            "seconds": round(time.perf_counter() - begun, 1),
            "train_loss": [round(m["loss"], 4) for m in result.train_metrics_clientapp.values()],
            "accuracy": [round(m["accuracy"], 4) for m in result.evaluate_metrics_clientapp.values()],
            "bytes_down_a_round": [r.down_bytes for r in server.rounds],
            "bytes_up_a_round": [r.up_bytes for r in server.rounds],
            "expert_bytes_up_a_client": expert_bytes(server),
            "taken": [len(r.taken) for r in server.rounds],
            "refused": [list(r.refused.values()) for r in server.rounds],
        }
    return {
        "task": "sarcastic headlines, MiniLM" if is_real() else "generated",
        "labels_of_clients": [dict(Counter(labels[n] for n in part)) for part in parts],
        "settings": {name: value for name, value in given.items() if name != "out"},
        "arms": arms,
    }


def expert_bytes(server: Server) -> int:
    """Return what a client of the server's rank sends of its experts, the head aside."""
    return sum(t.numel() * t.element_size() for name, t in server.tensors.items() if ".bank." in name)


client_side = client_app(build, train, evaluate)
server_side = ServerApp()


@server_side.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study, and leave its result where the command looks for it."""
    Path(settings()["out"]).write_text(json.dumps(study(grid)), encoding="utf-8")
