"""FlyLoRA's merges: exact with top-k, exact with a shared factor, and the dense one.  pytest tests/merge/test_fly.py"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moa.errors import ConfigError, ShapeError
from moa.merge import Dense, LowRank, average_factors, fly_shared, fly_stack, merge

from .tools import assert_close, factors

K = 2
WEIGHTS = [0.2, 1.5, -0.3]


def one(delta: LowRank, x: Tensor, k: int, bias: Tensor | None = None, select: str = "magnitude") -> Tensor:
    """FlyLoRA of one task, a row and a rank at a time."""
    out = torch.zeros(len(x), delta.shape[0], dtype=x.dtype)
    for row, v in enumerate(x):
        y = delta.down @ v
        score = (y.abs() if select == "magnitude" else y) + (0 if bias is None else bias)
        for j in sorted(range(len(y)), key=lambda j: -float(score[j]))[:k]:
            out[row] += y[j] * delta.up[:, j]
    return out


def tasks(shared: bool = False) -> list[LowRank]:
    parts = [factors(4, seed=s) for s in range(3)]
    return [LowRank(parts[0].down, p.up) for p in parts] if shared else parts


@pytest.mark.parametrize("select", ["magnitude", "signed"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_stack_keeps_every_tasks_top_k(select: str, biased: bool) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    biases = [torch.randn(4, dtype=torch.float64) for _ in range(3)] if biased else None
    stacked = fly_stack(tasks(), K, WEIGHTS, biases=biases, select=select)
    expected = sum(
        w * one(d, x, K, biases[t] if biases else None, select)
        for t, (w, d) in enumerate(zip(WEIGHTS, tasks(), strict=True))
    )
    assert_close(stacked(x), expected, 1e-12)  # type: ignore[arg-type]
    assert_close(stacked(x.view(2, 3, 5)), expected.view(2, 3, 7), 1e-12)  # type: ignore[union-attr]


def test_all_ranks_active_is_the_plain_average() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    mean = torch.stack([d.dense() for d in tasks()]).mean(0)
    assert_close(fly_stack(tasks(), 4)(x), x @ mean.T, 1e-12)
    dense = merge([{"w": d} for d in tasks()], method="flylora_dense")["w"]
    assert_close(dense.dense(), mean, 1e-12)
    with pytest.raises(AssertionError):  # the dense form drops the top-k
        assert_close(fly_stack(tasks(), K)(x), x @ mean.T, 1e-2)


def test_a_shared_factor_keeps_rank_and_top_k() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    shared = tasks(shared=True)
    merged = fly_shared(shared, WEIGHTS)
    assert merged.down is shared[0].down
    assert merged.rank == 4
    expected = sum(w * one(d, x, K) for w, d in zip(WEIGHTS, shared, strict=True))
    assert_close(one(merged, x, K), expected, 1e-12)  # type: ignore[arg-type]
    row = merge([{"w": d} for d in shared], method="flylora_dense")["w"]
    assert isinstance(row, LowRank)
    assert row.rank == 4
    # the released script averages the factors: right here, and only here
    assert_close(average_factors(shared, [1 / 3] * 3).dense(), row.dense(), 1e-12)
    with pytest.raises(AssertionError):
        mean = merge([{"w": d} for d in tasks()], method="flylora_dense")["w"].dense()
        assert_close(average_factors(tasks(), [1 / 3] * 3).dense(), mean, 1e-2)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="adapter 1 is not adapter 0's"):
        fly_shared(tasks())
    with pytest.raises(ConfigError, match="k is 5"):
        fly_stack(tasks(), 5)
    with pytest.raises(ConfigError, match=r"ranks \[4, 3\]"):
        fly_stack([factors(4), factors(3)], 2)
    with pytest.raises(ConfigError, match="1 dense of 2"):
        fly_stack([factors(4), Dense(factors().dense())], 2)
    with pytest.raises(ShapeError, match="shapes"):
        fly_stack([factors(4), factors(4, o=8)], 2)
    with pytest.raises(ConfigError, match="2 weights for 3"):
        fly_stack(tasks(), 2, [1.0, 1.0])
    with pytest.raises(ConfigError, match="biases"):
        fly_stack(tasks(), 2, biases=[torch.zeros(3)] * 3)
    with pytest.raises(ConfigError, match="Did you mean 'signed'"):
        fly_stack(tasks(), 2, select="sign")
