"""The comparison fails on a wrong value, a wrong shape and a NaN.  pytest tests/merge/test_tools.py"""

from __future__ import annotations

import pytest
import torch

from .tools import assert_close


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([1.0, 2.0 + 1e-8], dtype=torch.float64), torch.ones(2, 1), torch.tensor([1.0, float("nan")])],
    ids=["value", "shape", "nan"],
)
def test_close_fails(wrong: torch.Tensor) -> None:
    right = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_close(right.clone(), right)
    with pytest.raises(AssertionError):
        assert_close(wrong, right)
