"""The routing's load: counted by layer and expert, and read by the engine's metrics."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch

from moa.routers import FixedRouter
from moa.serving.vllm.load_metrics import VARIABLE, LoadCollector
from moa.serving.vllm.routing_load import RoutingLoad
from moa.types import Routing

LAYER = SimpleNamespace(name="layer")


def test_the_latest_batch_of_every_layer_is_counted_once(tmp_path):
    load, router = RoutingLoad(tmp_path / "load.json"), FixedRouter(4, 3)
    old = Routing(torch.ones(2, 1), torch.tensor([[0], [0]]), 3)
    new = Routing(torch.full((1, 2, 2), 0.5), torch.tensor([[[0, 2], [1, 2]]]), 3)  # (1, 2 rows, K)
    for routing in (old, new):
        load.add(LAYER, routing, None, router)
    load.keep(("q", "k"), torch.tensor([[[0.3, 0.7, 0.0], [0.0, 0.0, 1.0]]]))  # (1 row, 2 mixtures, E)
    load.publish()
    load.publish()  # nothing is new
    assert json.loads(load.file.read_text()) == {"layer": [1, 1, 2], "q": [1, 1, 0], "k": [0, 0, 1]}
    load.add(LAYER, old, None, router)
    load.publish()
    assert json.loads(load.file.read_text())["layer"] == [3, 1, 2]


def test_metrics_are_empty_until_a_model_runs(tmp_path):
    assert LoadCollector(tmp_path).describe() == []


def engine(mode: str) -> SimpleNamespace:
    return SimpleNamespace(compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(name=mode)))


def test_engines_of_one_process_have_a_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr(RoutingLoad, "start", lambda self: None)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert RoutingLoad.of_engine(engine("NONE")) is None
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    loads = [RoutingLoad.of_engine(engine("NONE")) for _ in range(2)]
    for load in loads:
        load.add(LAYER, Routing(torch.ones(2, 1), torch.tensor([[0], [2]]), 3), None, FixedRouter(4, 3))
        load.publish()
    assert len({load.file for load in loads}) == 2
    totals: dict[int, int] = {}
    for file in tmp_path.glob("*.json"):
        for expert, count in enumerate(json.loads(file.read_text())["layer"]):
            totals[expert] = totals.get(expert, 0) + count
    assert totals == {0: 2, 1: 0, 2: 2}


def test_replayed_graphs_show_no_load_rather_than_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for mode in ("PIECEWISE", "FULL", "FULL_AND_PIECEWISE"):
        assert RoutingLoad.of_engine(engine(mode)) is None
