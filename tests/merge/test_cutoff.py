"""The threshold over a whole model equals a sort of everything.  pytest tests/merge/test_cutoff.py"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import ConfigError, ShapeError
from moa.merge.cutoff import model_threshold


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.999, 1.0])
def test_equals_sorting_everything(dtype: torch.dtype, density: float) -> None:
    tensors = [torch.randn(31, 17, dtype=dtype) * 10**p for p in (-20, -3, 0, 2)]
    tensors += [torch.zeros(13, dtype=dtype), torch.randn(0, 4, dtype=dtype)]
    ranked = torch.cat([t.reshape(-1) for t in tensors]).abs().sort(descending=True).values
    k = int(density * len(ranked))
    expected = float(ranked[k - 1]) if k else math.inf
    assert model_threshold(lambda: tensors, len(ranked), density, dtype) == expected


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_any_numbers(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    halves = [torch.tensor(values[:3]), torch.tensor(values[3:])]
    got = model_threshold(lambda: halves, len(values), k / len(values))
    k = int(k / len(values) * len(values))
    ranked = torch.tensor(values).abs().sort(descending=True).values
    assert got == (float(ranked[k - 1]) if k else math.inf)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="density"):
        model_threshold(lambda: [torch.ones(2)], 2, 0.0)
    with pytest.raises(ConfigError, match="holds 2 entries, 3 were announced"):
        model_threshold(lambda: [torch.ones(2)], 3, 0.5)
    with pytest.raises(ShapeError, match="two types"):
        model_threshold(lambda: [torch.ones(2), torch.ones(2).double()], 4, 0.5)
