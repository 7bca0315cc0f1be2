"""Measures and their standard errors against scipy and torch. Run: pytest tests/runs/test_metrics.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from moa.runs.metrics import ERROR, Answers, Classes, Numbers, Z, wilson
from moa.runs.summary import score_table


@pytest.mark.parametrize(("right", "n"), [(0, 5), (1, 1), (7, 12), (12, 12), (480, 1000)])
def test_the_interval_is_scipys(right: int, n: int) -> None:
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def kept(measures: Any, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the scores of one batch of logits (n, …) and labels (n, …)."""
    parts = [part.numpy() for part in measures.keep((logits, None), labels)]
    scores: dict[str, float] = measures.scores(parts, labels.numpy())
    return scores


def test_classes() -> None:
    logits = torch.tensor([[0.1, 2.0, float("-inf")], [3.0, 2.0, 1.0], [0.0, 1.0, 2.0], [0.0, 0.5, -1.0]])
    labels = torch.tensor([1, 0, 0, 1])
    losses = F.cross_entropy(logits, labels, reduction="none").numpy()
    for own in (labels, labels[:, None].float()):  # beside numbers a class is one, too
        got = kept(Classes(), logits, own)
        assert got["accuracy"] == 0.75
        assert got["loss"] == pytest.approx(losses.mean())
        assert got["loss" + ERROR] == pytest.approx(stats.sem(losses))
    assert "loss" + ERROR not in kept(Classes(), logits[:1], labels[:1])


def numbers(n: int, wide: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return predictions and numbers (n, L), some of them equal to others."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(n, wide, generator=generator, dtype=torch.float64).mul(4).round() / 4
    return truth * 0.7 + torch.randn(n, wide, generator=generator, dtype=torch.float64) + 0.3, truth


def test_numbers_are_scored_as_scipy_and_torch_do() -> None:
    guess, truth = numbers(2000, 1)
    got = kept(Numbers(["size"]), torch.cat([guess, torch.full_like(guess, -torch.inf)], 1), truth)
    x, y = guess[:, 0].numpy(), truth[:, 0].numpy()
    assert got["rmse"] == pytest.approx(float(F.mse_loss(guess, truth)) ** 0.5, rel=1e-12)
    assert got["mae"] == pytest.approx(float(F.l1_loss(guess, truth)), rel=1e-12)
    assert got["loss"] == pytest.approx(float(F.mse_loss(guess, truth)), rel=1e-12)
    assert got["mae" + ERROR] == pytest.approx(stats.sem(abs(x - y)))
    assert got["loss" + ERROR] == pytest.approx(stats.sem((x - y) ** 2))
    theirs = stats.pearsonr(x, y)
    assert got["pearson"] == pytest.approx(theirs.statistic, rel=1e-12)
    interval = theirs.confidence_interval(0.95)
    assert Z * got["pearson" + ERROR] == pytest.approx((interval.high - interval.low) / 2, rel=1e-2)
    assert got["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def test_the_errors_of_rmse_and_rank_correlation_are_those_of_a_bootstrap() -> None:
    guess, truth = numbers(1500, 1)
    got = kept(Numbers(["size"]), guess, truth)
    x, y = guess[:, 0].numpy(), truth[:, 0].numpy()
    pick = np.random.default_rng(0).integers(0, len(x), (1000, len(x)))
    assert got["rmse" + ERROR] == pytest.approx(np.sqrt(((x - y)[pick] ** 2).mean(1)).std(), rel=0.1)
    ranks = [stats.spearmanr(x[rows], y[rows]).statistic for rows in pick[:400]]
    assert got["spearman" + ERROR] == pytest.approx(np.std(ranks), rel=0.15)


def test_several_numbers_are_means_and_each_is_there() -> None:
    guess, truth = numbers(50, 3)
    names = ["a", "b", "c"]
    got = kept(Numbers(names), guess, truth)
    each = [kept(Numbers([name]), guess[:, i : i + 1], truth[:, i : i + 1]) for i, name in enumerate(names)]
    for measure in ("rmse", "mae", "pearson", "spearman"):
        assert got[measure] == pytest.approx(np.mean([row[measure] for row in each]))
        assert [got[f"{measure}.{name}"] for name in names] == pytest.approx([row[measure] for row in each])
    assert got["loss"] == pytest.approx(float(F.mse_loss(guess, truth)))


def test_a_constant_has_no_correlation() -> None:
    got = kept(Numbers(["a"]), torch.ones(5, 1), torch.arange(5.0)[:, None])
    assert "pearson" not in got and "spearman" not in got and got["mae"] == 1.4
    perfect = kept(Numbers(["a"]), torch.arange(5.0)[:, None], torch.arange(5.0)[:, None])
    assert (perfect["rmse"], perfect["rmse" + ERROR], perfect["pearson"]) == (0, 0, 1)


def answers(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (n, 6, 9) and labels (n, 6) of rows whose last one to five tokens are learned."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(9, (n, 6), generator=generator)
    starts = torch.randint(1, 6, (n, 1), generator=generator)
    return torch.randn(n, 6, 9, generator=generator), torch.where(torch.arange(6) < starts, -100, labels)


def test_whole_answers() -> None:
    """Position t predicts label t + 1; unlabelled positions do not count."""
    best = F.one_hot(torch.tensor([[8, 4, 6, 8], [8, 4, 5, 0]]), 9).float()
    labels = torch.tensor([[-100, -100, 4, 5]] * 2)
    assert kept(Answers(), best, labels)["accuracy"] == 0.5
    logits, labels = answers(40)
    got = kept(Answers(), logits, labels)
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert got["loss"] == pytest.approx(float(theirs), rel=1e-6)


def test_the_error_of_a_loss_over_tokens_is_that_of_resampled_rows() -> None:
    logits, labels = answers(1000)
    got = kept(Answers(), logits, labels)
    sums = Answers().keep(logits, labels)[1].numpy()
    counts = (labels[:, 1:] != -100).sum(1).numpy()
    pick = np.random.default_rng(0).integers(0, 1000, (2000, 1000))
    assert got["loss" + ERROR] == pytest.approx((sums[pick].sum(1) / counts[pick].sum(1)).std(), rel=0.1)


def test_the_table_shows_the_bar_beside_every_score() -> None:
    tasks = {
        "one": {"kind": "classification", "majority": 0.5, "constant": None, "evaluation_rows": 12},
        "two": {"kind": "regression", "majority": None, "constant": {"rmse": 2.0, "mae": 1.0}, "evaluation_rows": 9},
    }
    scores = {
        "one": {"accuracy": 7 / 12, "loss": 0.4, "loss_error": 0.1},
        "two": {"rmse": 1.5, "rmse_error": 0.2, "mae": 1.0, "loss": 2.25},
    }
    table = score_table({"tasks": tasks, "scores": {"mixture": scores}})
    theirs = stats.binomtest(7, 12).proportion_ci(method="wilson")
    assert f"0.583 ±{(theirs.high - theirs.low) / 2:.3f}" in table
    assert f"0.400 ±{Z * 0.1:.3f}" in table and f"1.500 ±{Z * 0.2:.3f}" in table
    accuracy, rmse, _, loss, bars = table.split("\n\n")
    assert "Wilson" in bars and "Pearson" not in table
    assert accuracy.splitlines()[-1].startswith("mean") and "two" not in accuracy
    assert rmse.splitlines()[1].split() == ["two", "9", "2.000", "1.500", f"±{Z * 0.2:.3f}"]
    assert [line.split()[0] for line in loss.splitlines()] == ["evaluation", "one", "two"]  # of two kinds: no mean
    for part in (accuracy, rmse, loss):
        assert len({len(line) for line in part.splitlines()}) == 1


def test_the_mean_of_tasks_has_a_bar() -> None:
    tasks = {name: {"majority": None, "evaluation_rows": 50} for name in "ab"}
    rows = {
        "a": {"accuracy": 0.5, "loss": 1.0, "loss_error": 0.3},
        "b": {"accuracy": 0.5, "loss": 2.0, "loss_error": 0.4},
    }
    table = score_table({"tasks": tasks, "scores": {"mixture": rows}})
    assert table.split("\n\n")[1].splitlines()[-1].split() == ["mean", "1.500", f"±{Z * 0.25:.3f}"]
