"""Speed on one CPU thread against plain versions of the peers, at about 60 % of the published targets.

Ratios of process time within one run, the least of a few interleaved rounds. Run: pytest tests/kernels/test_speed.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from experiments.bench.common import interleaved
from experiments.bench.kernel_baselines import PEERS, batched_mm, plain_concat, scatter_copies
from experiments.bench.kernels import make_inputs, regret, train_step, whole_layer
from moa.kernels import low_rank_mixture
from moa.kernels.reference import low_rank_mixture_reference

ROUNDS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ALL = {**PEERS, "batched": batched_mm, "concat": plain_concat, "copies": scatter_copies}


@pytest.mark.parametrize("name", [name for name in ALL if name != "MoLA as coded"])
def test_the_baselines_compute_the_same(name):
    inputs = make_inputs(n_rows=33, d=64, n_experts=8, rank=8)
    operands = inputs.x, inputs.a, inputs.b, inputs.weights, inputs.indices
    torch.testing.assert_close(ALL[name](*operands), low_rank_mixture_reference(*operands), rtol=1e-4, atol=1e-5)


def test_mola_computes_the_same_but_for_its_dropout(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p: x)
    inputs = make_inputs(n_rows=33, d=64, n_experts=8, rank=8)
    operands = inputs.x, inputs.a, inputs.b, inputs.weights, inputs.indices
    got = PEERS["MoLA as coded"](*operands)
    torch.testing.assert_close(got, low_rank_mixture_reference(*operands), rtol=1e-4, atol=1e-5)


def slower_than_moa(dtype: torch.dtype, names: tuple[str, ...], **shape: int) -> dict[str, float]:
    inputs = make_inputs(dtype=dtype, **shape)
    functions = {"moa": low_rank_mixture, **{name: PEERS[name] for name in names}}
    times = interleaved({name: train_step(f, inputs) for name, f in functions.items()}, ROUNDS, warmup=1)
    return {name: times[name]["min_s"] / times["moa"]["min_s"] for name in names}


def test_peers_are_slower_in_fp32():
    least = {"lean python loop": 1.5, "MoLA as coded": 1.8, "X-LoRA loop": 3, "Arrow einsum": 1.6, "HF grouped_mm": 1.4}
    ratios = slower_than_moa(torch.float32, tuple(least))
    assert all(ratios[name] >= least[name] for name in least), ratios


def test_the_loop_is_slower_in_bf16():
    ratios = slower_than_moa(torch.bfloat16, ("lean python loop",), n_rows=512)
    assert ratios["lean python loop"] >= 2.5, ratios


def test_the_loop_is_slower_with_many_experts():
    ratios = slower_than_moa(torch.float32, ("lean python loop",), n_experts=128)
    assert ratios["lean python loop"] >= 2, ratios


def test_a_mixed_layer_costs_little_more_than_its_frozen_base():
    assert whole_layer("fp32", ROUNDS)["moa_over_base"] <= 1.6


def test_the_dispatcher_is_close_to_the_best_engine(monkeypatch):
    monkeypatch.setattr("experiments.bench.kernels.REGRET_SHAPES", ((8, 8), (16, 16)))
    found = regret(ROUNDS)
    assert found["worst"] <= 1.5, found
