"""Error bars of paired differences. Run: pytest tests/runs/test_paired.py"""

from __future__ import annotations

import math

import numpy as np
import pytest

from moa.runs.paired import paired_difference, t_quantile


@pytest.mark.parametrize(
    ("share", "freedom", "value"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 10, 2.228),
        (0.95, 5, 2.015),
        (0.995, 30, 2.750),
        (0.975, 1e6, 1.960),
    ],
)
def test_quantiles_of_the_printed_tables(share: float, freedom: float, value: float) -> None:
    assert t_quantile(share, freedom) == pytest.approx(value, abs=2e-3)
    assert t_quantile(1 - share, freedom) == pytest.approx(-value, abs=2e-3)


def test_one_seed_and_one_task_is_the_paired_t_test() -> None:
    rows = np.array([[1.0, 0, 0, -1, 1, 1, 0, 0, 1, 0]])
    mean, half = paired_difference([rows])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.2622 * math.sqrt(rows.var(ddof=1) / 10), rel=1e-3)


def test_tasks_count_alike_whatever_their_rows() -> None:
    few, many = np.full((2, 10), 1.0), np.zeros((2, 1000))
    assert paired_difference([few, many]) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("of_seeds", "of_rows", "least"), [(0.05, 0.6, 0.94), (0.0, 0.6, 0.94), (0.05, 0.1, 0.9), (0.1, 0.0, 0.9)]
)
def test_intervals_hold_the_truth_as_often_as_they_say(of_seeds: float, of_rows: float, least: float) -> None:
    """Crossed seeds and rows around 0: so many of 400 intervals hold it; without the seeds' part far fewer would."""
    draw = np.random.default_rng(0)
    held = without = 0
    for _ in range(400):
        seeds, rows = draw.normal(0, of_seeds, (3, 1)), draw.normal(0, of_rows, (1, 150))
        values = seeds + rows + draw.normal(0, 0.3, (3, 150))
        mean, half = paired_difference([values])
        held += abs(mean) <= half
        without += abs(mean) <= 1.96 * math.sqrt(values.mean(0).var(ddof=1) / 150)
    assert held >= least * 400
    assert of_seeds < of_rows or without < 0.6 * 400
