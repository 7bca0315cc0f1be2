"""Error bars of shares. Run: pytest tests/runs/test_metrics.py"""

from __future__ import annotations

import pytest

from moa.runs.metrics import wilson
from moa.runs.summary import score_table

stats = pytest.importorskip("scipy.stats", reason="scipy, the oracle of the interval, is not installed")


@pytest.mark.parametrize(("right", "n"), [(0, 5), (1, 1), (7, 12), (12, 12), (480, 1000)])
def test_the_interval_is_scipys(right: int, n: int) -> None:
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_table_shows_the_bar_beside_every_accuracy() -> None:
    tasks = {"one": {"majority": 0.5, "evaluation_rows": 12}}
    table = score_table({"tasks": tasks, "scores": {"mixture": {"one": {"accuracy": 7 / 12, "loss": 0.4}}}})
    theirs = stats.binomtest(7, 12).proportion_ci(method="wilson")
    assert f"0.583 ±{(theirs.high - theirs.low) / 2:.3f}" in table
    assert "95 % Wilson interval" in table
    accuracy, loss = table.split("\n\n")
    header, row = accuracy.splitlines()[:2]
    assert len(header) == len(row) and "±" not in loss
