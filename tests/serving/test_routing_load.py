"""The routing's load: counted by layer and expert, and read by the engine's metrics."""

from __future__ import annotations

import json

import torch

from moa.routers import FixedRouter
from moa.serving.vllm.load_metrics import LoadCollector
from moa.serving.vllm.routing_load import RoutingLoad
from moa.types import Routing


def test_the_latest_batch_of_every_layer_is_counted_once(tmp_path):
    load, router = RoutingLoad(tmp_path / "load.json"), FixedRouter(4, 3)
    old = Routing(torch.ones(2, 1), torch.tensor([[0], [0]]), 3)
    new = Routing(torch.full((1, 2, 2), 0.5), torch.tensor([[[0, 2], [1, 2]]]), 3)  # (1, 2 rows, K)
    for routing in (old, new):
        load.add("layer", routing, None, router)
    load.keep(("q", "k"), torch.tensor([[[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]]]))  # (1 row, 2 mixtures, E)
    load.publish()
    load.publish()  # nothing is new
    assert json.loads(load.file.read_text()) == {"layer": [1, 1, 2], "q": [1, 1, 0], "k": [0, 0, 1]}
    load.add("layer", old, None, router)
    load.publish()
    assert json.loads(load.file.read_text())["layer"] == [3, 1, 2]


def test_metrics_are_empty_until_a_model_runs(tmp_path):
    assert LoadCollector(tmp_path / "load.json").describe() == []
