"""EMR: a loop over entries, and the bytes it keeps.  pytest tests/merge/test_elect.py"""

from __future__ import annotations

import pytest
import torch

from moa.errors import ConfigError, ShapeError
from moa.merge import emr

from .tools import assert_close, factors, matrices


def by_loop(tasks: list[dict[str, torch.Tensor]], task: int) -> dict[str, torch.Tensor]:
    unified: dict[str, torch.Tensor] = {}
    own = shared = 0.0
    for name, first in tasks[0].items():
        out = torch.zeros_like(first)
        for p in range(first.numel()):
            values = [float(t[name].reshape(-1)[p]) for t in tasks]
            sign = (sum(values) > 0) - (sum(values) < 0)
            best = max((abs(v) for v in values if v * sign > 0), default=0.0)
            out.view(-1)[p] = sign * best
            own += abs(values[task])
            shared += best if values[task] * sign > 0 else 0.0
        unified[name] = out
    return {n: own / shared * u * (tasks[task][n] * u > 0) for n, u in unified.items()}


def test_every_tasks_change_entry_by_entry() -> None:
    # tensors of very different size and scale: a mean over tensors would not give this scale
    tasks = [{"a": a, "b": 50 * b} for a, b in zip(matrices(3), matrices(3, 2, 2, seed=3), strict=True)]
    tasks[0]["a"][0, 0], tasks[1]["a"][0, 0], tasks[2]["a"][0, 0] = 1.0, -1.0, 0.0
    result = emr(tasks)
    for task in range(3):
        got, expected = result.delta(task), by_loop(tasks, task)
        for name in expected:
            assert_close(got[name].dense(), expected[name], 1e-13)


def test_one_task_comes_back_and_the_masks_take_one_bit() -> None:
    x = torch.randn(7, 5)
    result = emr([{"w": x}])
    assert_close(result.delta(0)["w"].dense(), x, 1e-6)
    three = emr([{"w": x}, {"w": -x}, {"w": 2 * x}])
    assert three.nbytes() == 35 * 4 + 3 * 5 + 3 * 8
    assert float(three.scales[1]) == 0, "a task that agrees nowhere"


def test_factors_come_in_as_they_are() -> None:
    f = factors()
    assert_close(emr([{"w": f}]).delta(0)["w"].dense(), f.dense(), 1e-13)
    assert_close(emr([{"w": (f.down, f.up)}]).delta(0)["w"].dense(), f.dense(), 1e-13)


def test_refusals() -> None:
    x = torch.ones(2)
    with pytest.raises(ConfigError, match="no adapters"):
        emr([])
    with pytest.raises(ConfigError, match="adapter 1 holds other names"):
        emr([{"w": x}, {"v": x}])
    with pytest.raises(ShapeError, match="'w' has shapes"):
        emr([{"w": x}, {"w": torch.ones(3)}])
    with pytest.raises(ConfigError, match="task 1 was asked for"):
        emr([{"w": x}]).delta(1)
