"""The static dispatcher and the list of engines. Run: pytest tests/kernels/test_dispatch.py"""

from __future__ import annotations

import pytest
import torch

from moa.kernels import choose_engine, dispatch, engines


def choose(n_experts: int, rank: int, k: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    return choose_engine(2048, 1024, 1024, n_experts, rank, k, dtype, device)


def test_fp32_on_cpu_changes_over_at_fifty_columns_per_slot():
    assert choose(10, 10, 2) == "concat"
    assert choose(101, 1, 2) == "sorted"
    assert choose(64, 16, 4) == "sorted"


@pytest.mark.parametrize(("native", "expected"), [(True, "concat"), (False, "sorted")])
def test_bf16_on_cpu_depends_on_the_hardware(monkeypatch, native, expected):
    monkeypatch.setattr(dispatch, "has_native_matmul", lambda dtype: native)
    assert choose(11, 20, 2, torch.bfloat16) == expected
    assert choose(11, 20, 2, torch.float32) == "sorted"


def test_a_dense_routing_is_never_sorted():
    assert choose(64, 64, 64) == "concat"


def test_the_choice_is_an_available_engine_or_plain():
    available = [name for name, reason in engines().items() if reason is None]
    for device in ("cpu", "meta", "cuda"):
        assert choose(8, 8, 2, torch.bfloat16, device) in (available if device != "cuda" else engines())


def test_every_reason_says_something():
    assert {"concat", "sorted"} <= {name for name, reason in engines().items() if reason is None}
    for name, reason in engines().items():
        assert reason is None or len(reason) > 20, name
