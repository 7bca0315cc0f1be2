"""What several processes see is added up: they start where one process with all batches does."""

from __future__ import annotations

import pytest
import torch

from .processes import run_together
from .starting import CASES, batches, started


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:  # type: ignore[type-arg]
    folder = tmp_path_factory.mktemp("starting")
    run_together("tests.parallel.starting", 2, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("method", list(CASES))
def test_two_processes_start_where_one_does(method: str, two: list[dict]) -> None:  # type: ignore[type-arg]
    expected, shares = started(method, batches())
    for found, held in (rank[method] for rank in two):
        assert held == pytest.approx(shares, rel=1e-6)
        for name, tensor in found.items():
            if method != "eva" or name.endswith("down"):
                torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-8, msg=name)
    alone, _ = started(method, batches()[::2])
    assert any(not torch.allclose(alone[name], expected[name], atol=1e-4) for name in expected)
