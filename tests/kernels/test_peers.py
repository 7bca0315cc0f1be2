"""The plain versions of the peers, which the benchmarks time, compute what `low_rank_mixture` computes.

Run: pytest tests/kernels/test_peers.py
"""

from __future__ import annotations

import pytest
import torch

from experiments.bench.kernel_baselines import PEERS, batched_mm, plain_concat, scatter_copies
from experiments.bench.kernels import GATES, gates, make_inputs
from moa.kernels.reference import low_rank_mixture_reference

ALL = {**PEERS, "batched": batched_mm, "concat": plain_concat, "copies": scatter_copies}


@pytest.mark.parametrize("name", ALL)
def test_the_baselines_compute_the_same(name, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.dropout", lambda x, p: x)  # MoLA draws one for each expert
    inputs = make_inputs(n_rows=33, d=64, n_experts=8, rank=8)
    operands = inputs.x, inputs.a, inputs.b, inputs.weights, inputs.indices
    torch.testing.assert_close(ALL[name](*operands), low_rank_mixture_reference(*operands), rtol=1e-4, atol=1e-5)


def test_a_gate_that_does_not_hold_is_said():
    """No clock: the benchmark's own judgement, on numbers that are given to it."""
    seconds = {name: {"median_s": 10.0} for name in (*PEERS, "base")}
    tables = ("lora_path_fp32_r8", "lora_path_bf16_r8", "many_experts_fp32")
    result = {table: {"seconds": {**seconds, "moa": {"median_s": 1.0}}} for table in tables}
    result["whole_layer_fp32"] = {"seconds": {"base": {"median_s": 1.0}, "moa": {"median_s": 1.5}}}
    result["regret_fp32"] = {"worst": 1.1}
    assert all(row["holds"] for row in gates(result).values())
    result["many_experts_fp32"]["seconds"]["moa"]["median_s"] = 9.0
    result["regret_fp32"]["worst"] = 1.6
    assert [name for name, row in gates(result).items() if not row["holds"]] == [
        "many_experts_fp32: lean python loop / moa",
        "regret_fp32: worst",
    ]
    assert len(GATES) == 7
