"""Routing statistics against closed forms. Run: pytest tests/monitor/test_statistics.py"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moa.errors import ConfigError
from moa.monitor import statistics as monitor
from moa.monitor.statistics import LayerLoad, RoutingStatistics, expert_load, has_collapsed, spread
from moa.types import Routing


def chosen(indices: Any, n_experts: int) -> Routing:
    """Return a sparse routing with weight 1 on the given indices (*rows, K)."""
    index = torch.as_tensor(indices)
    return Routing(torch.ones(index.shape), index, n_experts)


def record(routing: Routing, mask: Tensor | None = None, name: str = "a", router: object = None) -> Any:
    return SimpleNamespace(name=name, routing=routing, mask=mask, router=router, n_streams=1)


def assert_close(got: Tensor, want: Any) -> None:
    torch.testing.assert_close(got.double(), torch.as_tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_close_fails_on_a_wrong_value() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([0.5, 0.5]), [0.5, 0.50001])


# ---------------------------------------------------------------- measures


@pytest.mark.parametrize("n_experts", [1, 2, 8, 64])
def test_uniform_load(n_experts: int) -> None:
    load = torch.full((n_experts,), 1 / n_experts, dtype=torch.float64)
    assert_close(monitor.load_entropy(load), math.log(n_experts))
    assert_close(monitor.effective_experts(load), n_experts)
    assert_close(monitor.effective_fraction(load), 1)
    assert_close(monitor.dead_fraction(load), 0)
    assert_close(monitor.largest_share(load), 1 / n_experts)
    assert_close(monitor.max_violation(load), 0)


def test_one_hot_load() -> None:
    load = torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)
    assert_close(monitor.load_entropy(load), 0)
    assert_close(monitor.effective_experts(load), 1)
    assert_close(monitor.effective_fraction(load), 0.25)
    assert_close(monitor.dead_fraction(load), 0.75)
    assert_close(monitor.largest_share(load), 1)
    assert_close(monitor.max_violation(load), 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_k_hot_load_has_k_effective_experts(k: int) -> None:
    load = expert_load(chosen([list(range(k))] * 4, 8))
    assert_close(load, [1 / k] * k + [0] * (8 - k))
    assert_close(monitor.effective_experts(load), k)
    assert_close(monitor.dead_fraction(load), (8 - k) / 8)


def test_dead_share_is_relative_to_the_even_share() -> None:
    load = torch.tensor([0.02, 0.03, 0.45, 0.5])  # even share 0.25
    assert_close(monitor.dead_fraction(load, 0.1), 0.25)
    assert_close(monitor.dead_fraction(load, 0.2), 0.5)


def test_measures_work_on_many_layers_at_once() -> None:
    load = torch.softmax(torch.randn(5, 3, 8, dtype=torch.float64), -1)
    for measure in (monitor.load_entropy, monitor.dead_fraction, monitor.largest_share, monitor.max_violation):
        assert_close(measure(load), torch.stack([torch.stack([measure(row) for row in part]) for part in load]))


# ---------------------------------------------------------------- load


def test_masked_rows_do_not_count() -> None:
    routing = chosen([[[0, 1], [0, 1], [2, 3]], [[0, 2], [3, 1], [3, 2]]], 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(expert_load(routing, mask), [3 / 6, 2 / 6, 1 / 6, 0])


def test_dense_routing_counts_by_weight() -> None:
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.1, -0.9, 0.0]])
    assert_close(expert_load(Routing(weights, None, 3)), [0.8 / 2, 1.1 / 2, 0.1 / 2])


def test_sequence_and_constant_routings_count_their_own_rows() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert_close(expert_load(chosen([[[0]], [[1]]], 2), mask), [0.5, 0.5])
    assert_close(expert_load(Routing(torch.tensor([0.25, 0.75]), None, 2), mask), [0.25, 0.75])


def test_no_counted_row_gives_zeros_not_nan() -> None:
    assert_close(expert_load(chosen([[0], [1]], 2), torch.zeros(2, dtype=torch.bool)), [0, 0])


# ---------------------------------------------------------------- accumulation


@settings(deadline=None, max_examples=40)
@given(
    n_experts=st.integers(1, 9),
    rows=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    layers=st.integers(1, 4),
    dense=st.booleans(),
    masked=st.booleans(),
    data=st.data(),
)
def test_statistics_equal_the_load_of_everything_at_once(
    n_experts: int, rows: list[int], layers: int, dense: bool, masked: bool, data: st.DataObject
) -> None:
    k = n_experts if dense else data.draw(st.integers(1, n_experts))
    torch.manual_seed(0)
    statistics = RoutingStatistics()
    seen: dict[str, list[Tensor]] = {}
    for _ in range(3):
        trace = []
        mask = torch.rand(*rows) < 0.6 if masked else None
        for layer in range(layers):
            scores = torch.rand(*rows, n_experts)
            if dense:
                routing = Routing(scores, None, n_experts)
                use = scores.double()
            else:
                routing = chosen(scores.topk(k, -1).indices, n_experts)
                use = torch.zeros(*rows, n_experts, dtype=torch.float64)
                use.scatter_(-1, scores.topk(k, -1).indices, 1.0)
            if mask is not None:
                use = use[mask]
            trace.append(record(routing, mask, f"layer {layer}"))
            seen.setdefault(f"layer {layer}", []).append(use.reshape(-1, n_experts))
        statistics.add(trace)
    summary = statistics.summary()
    for name, parts in seen.items():
        total = torch.cat(parts)
        if not total.shape[0]:
            assert name not in summary
            continue
        assert_close(summary[name].load, total.sum(0) / total.sum())
        assert summary[name].rows == total.shape[0]
        assert summary[name].k == (None if dense else k)


def test_per_task_load() -> None:
    indices = torch.tensor([[[0], [0], [1]], [[2], [2], [2]], [[1], [1], [0]]])
    mask = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    statistics = RoutingStatistics(n_tasks=4)
    statistics.add([record(chosen(indices, 3), mask)], torch.tensor([3, 1, 3]))
    layer = statistics.summary()["a"]
    assert_close(layer.load, [2 / 6, 1 / 6, 3 / 6])
    assert sorted(layer.by_task) == [1, 3]
    assert_close(layer.by_task[1], [0, 0, 1])
    assert_close(layer.by_task[3], [2 / 3, 1 / 3, 0])
    assert layer.rows == 6 and layer.rows_without_task == 0


@pytest.mark.parametrize("rows", [(4, 3), (4, 1), (12,), (8, 2)], ids=["token", "sequence", "flat", "beams"])
def test_task_ids_reach_the_rows_of_every_granularity(rows: tuple[int, ...]) -> None:
    per_example = math.prod(rows) // 4
    owner = torch.arange(4).repeat_interleave(per_example).reshape(rows)
    statistics = RoutingStatistics(n_tasks=2)
    statistics.add([record(chosen(owner.unsqueeze(-1), 4))], torch.tensor([0, 1, 1, 0]))
    layer = statistics.summary()["a"]
    assert_close(layer.by_task[0], [0.5, 0, 0, 0.5])
    assert_close(layer.by_task[1], [0, 0.5, 0.5, 0])


def test_a_constant_routing_is_every_tasks_own() -> None:
    statistics = RoutingStatistics(n_tasks=3)
    statistics.add([record(Routing(torch.tensor([0.25, 0.75]), None, 2))], torch.tensor([0, 2, 2]))
    layer = statistics.summary()["a"]
    assert sorted(layer.by_task) == [0, 2]
    assert_close(layer.by_task[2], [0.25, 0.75])


def test_task_ids_out_of_range_count_without_a_task() -> None:
    statistics = RoutingStatistics(n_tasks=2)
    statistics.add([record(chosen([[0], [1], [1]], 2))], torch.tensor([0, 2, -1]))
    layer = statistics.summary()["a"]
    assert list(layer.by_task) == [0] and layer.rows_without_task == 2 and layer.rows == 3


def test_counts_stay_exact_under_autocast() -> None:
    routing = chosen(torch.zeros(1, 1000, 1, dtype=torch.long), 2)
    statistics = RoutingStatistics(n_tasks=1)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            statistics.add([record(routing)], torch.tensor([0]))
    assert statistics.summary()["a"].rows == 3000


def test_two_routers_of_one_layer_are_two_entries_and_a_shared_layer_is_one() -> None:
    first, second = object(), object()
    statistics = RoutingStatistics()
    statistics.add(
        [
            record(chosen([[0]], 2), router=first),
            record(chosen([[1]], 3), router=second),
            record(chosen([[1]], 2), router=first),
        ]
    )
    summary = statistics.summary()
    assert list(summary) == ["a", "a#1"]
    assert_close(summary["a"].load, [0.5, 0.5])
    assert_close(summary["a#1"].load, [0, 1, 0])


def test_large_groups_are_cut_without_changing_the_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = [record(chosen(torch.randint(4, (6, 1)), 4), name=f"layer {i}") for i in range(5)]
    whole, cut = RoutingStatistics(), RoutingStatistics()
    whole.add(trace)
    monkeypatch.setattr(monitor, "_CHUNK", 50)
    cut.add(trace)
    for name, layer in whole.summary().items():
        assert_close(cut.summary()[name].load, layer.load)


def test_adding_never_waits_for_the_device() -> None:
    """On the meta device every read of a value raises."""
    statistics = RoutingStatistics(n_tasks=3)
    index = torch.empty(4, 5, 2, dtype=torch.long, device="meta")
    mask = torch.empty(4, 5, dtype=torch.bool, device="meta")
    sparse = Routing(torch.empty(4, 5, 2, device="meta"), index, 8)
    dense = Routing(torch.empty(4, 1, 8, device="meta"), None, 8)
    trace = [record(sparse, mask), record(dense, mask, "b"), record(Routing(torch.empty(8, device="meta"), None, 8))]
    for _ in range(2):
        statistics.add(trace, torch.empty(4, dtype=torch.long, device="meta"))
    assert len(statistics) == 3
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        statistics.summary()


def test_statistics_keep_no_graph() -> None:
    weights = torch.rand(3, 4, requires_grad=True)
    statistics = RoutingStatistics()
    statistics.add([record(Routing(weights, None, 4))])
    assert not statistics.summary()["a"].load.requires_grad


def test_reset_forgets() -> None:
    statistics = RoutingStatistics()
    statistics.add([record(chosen([[0]], 2))])
    statistics.reset()
    assert len(statistics) == 0 and statistics.summary() == {}


@pytest.mark.parametrize("options", [{"n_tasks": -1}, {"dead_share": 0.0}, {"dead_share": 1.5}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="n_tasks must be >= 0 and dead_share in"):
        RoutingStatistics(**options)


def _one_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    statistics = RoutingStatistics(n_tasks=2)
    trace = [record(chosen([[0], [0], [1]] if rank == 0 else [[2]], 3))]
    if rank == 1:  # a layer that one process alone has seen
        trace.append(record(chosen([[1]], 2), name="b"))
    statistics.add(trace, torch.full((1,), rank))
    summary = statistics.summary(all_reduce=True)
    torch.save({name: (v.load, v.rows, dict(v.by_task)) for name, v in summary.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_all_reduce_adds_up_the_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_process, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert sorted(got) == ["a", "b"]
        load, rows, by_task = got["a"]
        assert_close(load, [0.5, 0.25, 0.25])
        assert rows == 4
        assert_close(by_task[0], [2 / 3, 1 / 3, 0])
        assert_close(by_task[1], [0, 0, 1])


# ---------------------------------------------------------------- collapse


def layer(load: list[float], k: int | None, rows: float = 1e4) -> LayerLoad:
    return LayerLoad(torch.tensor(load, dtype=torch.float64), rows, k)


@pytest.mark.parametrize(
    ("load", "k", "collapsed"),
    [
        ([1, 0, 0, 0, 0, 0, 0, 0], 1, True),
        ([0.97, 0.03, 0, 0, 0, 0, 0, 0], 1, True),
        ([0.5, 0.5, 0, 0, 0, 0, 0, 0], 1, False),
        ([0.5, 0.5, 0, 0, 0, 0, 0, 0], 2, True),
        ([0.125] * 8, 1, False),
        ([0.125] * 8, 8, False),
        ([1.0], 1, False),
        ([0.5, 0.5], 2, False),
        ([0.5, 0.5], 1, False),
        ([1.0, 0.0], 1, True),
        ([0.99, 0.01, 0, 0], None, True),
        ([0.25] * 4, None, False),
    ],
)
def test_collapse_rule(load: list[float], k: int | None, collapsed: bool) -> None:
    assert has_collapsed(layer(load, k)) is collapsed


def test_spread_ends() -> None:
    assert spread(layer([0.5, 0.5, 0, 0], 2)) == pytest.approx(0)
    assert spread(layer([0.25] * 4, 2)) == pytest.approx(1)
    assert spread(layer([1.0], 1)) == 1


def test_few_rows_say_nothing() -> None:
    assert not has_collapsed(layer([0.5, 0.5, 0, 0, 0, 0, 0, 0], 2, rows=63))
    assert has_collapsed(layer([0.5, 0.5, 0, 0, 0, 0, 0, 0], 2, rows=64))


def test_collapse_in_words() -> None:
    message = monitor.collapse_message("encoder.3", layer([0.0, 0.49, 0.02, 0.49], 2), "Try this.")
    assert "encoder.3" in message and "experts 1, 3 took 98 %" in message and "2 of 4 experts are dead" in message
    assert message.endswith("Try this.")
