"""Calibration against torchmetrics, closed forms and samplers that are calibrated by construction."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import one_hot

from moa.errors import ConfigError, ShapeError
from moa.monitor.calibration import bins, calibration, equal_mass

ERRORS = ("ece", "mce", "ace", "class_ece", "tace", "brier")


def draw(n: int, n_classes: int, sharpness: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return probabilities (n, C), and labels drawn from them once they are `sharpness` times as sharp."""
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(n, n_classes, generator=rng, dtype=torch.float64)
    labels = torch.multinomial((sharpness * logits).softmax(-1), 1, generator=rng).squeeze(1)
    return logits.softmax(-1), labels


@pytest.mark.parametrize("n_bins", [1, 10, 15])
def test_the_errors_are_those_of_torchmetrics(n_bins: int) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probabilities, labels = draw(500, 4, sharpness=0.4)
    found = calibration(probabilities, labels, n_bins)
    for name, norm in (("ece", "l1"), ("mce", "max")):
        error = functional.multiclass_calibration_error(probabilities, labels, 4, n_bins, norm)
        assert found[name] == pytest.approx(error.item(), abs=1e-6), name
        assert found[name] > 0.03


def test_a_prediction_without_fault_scores_zero() -> None:
    labels = torch.arange(12) % 4
    found = calibration(one_hot(labels, 4).double(), labels)
    assert [found[name] for name in ERRORS] == [0.0] * len(ERRORS)


def test_one_that_is_always_wrong_and_sure() -> None:
    labels = torch.arange(12) % 4
    found = calibration(one_hot((labels + 1) % 4, 4).double(), labels)
    assert found["ece"] == found["mce"] == found["ace"] == 1.0
    assert found["brier"] == 2.0
    assert found["class_ece"] == pytest.approx(0.25 + 0.25)  # of a class: the quarter said, and the quarter meant


def test_constant_confidence_has_a_closed_form() -> None:
    """Seven of ten right, said with 0.9: every error of the top label is 0.2, of each of two classes half of 0.4."""
    p = torch.tensor([[0.9, 0.1]]).double().expand(10, 2)
    labels = torch.tensor([0] * 7 + [1] * 3)
    found = calibration(p, labels)
    for name in ("ece", "mce", "ace", "class_ece", "tace"):
        assert found[name] == pytest.approx(0.2), name
    assert found["brier"] == pytest.approx((7 * (0.1**2 + 0.1**2) + 3 * (0.9**2 + 0.9**2)) / 10)
    assert found["reliability"] == pytest.approx(2 * 0.2**2)
    assert found["resolution"] == pytest.approx(0)
    assert found["uncertainty"] == pytest.approx(2 * 0.7 * 0.3)
    assert found["within"] == pytest.approx(0)


def test_the_threshold_leaves_small_probabilities_out() -> None:
    p = torch.tensor([[0.995, 0.005, 0.0]], dtype=torch.float64).expand(4, 3)
    found = calibration(p, torch.zeros(4, dtype=torch.long))
    assert found["class_ece"] == pytest.approx(2 * 0.005 / 3)
    assert found["tace"] == pytest.approx(0.005 / 3)


def test_a_calibrated_sampler_is_near_zero_and_a_sharper_one_is_not() -> None:
    near = calibration(*draw(200_000, 3))
    assert max(near[name] for name in ("ece", "ace", "class_ece", "tace")) < 0.005
    far = calibration(*draw(20_000, 3, sharpness=0.5))
    assert min(far[name] for name in ("ece", "ace", "class_ece", "tace")) > 0.05


def test_the_brier_score_is_the_sum_of_its_parts_where_a_bin_has_one_value() -> None:
    rng = torch.Generator().manual_seed(1)
    first = (torch.randint(10, (4000,), generator=rng).double() + 0.5) / 10  # the middle of each bin
    p = torch.stack([first, 1 - first], -1)
    labels = (torch.rand(4000, generator=rng) > 0.3 + 0.4 * first).long()
    found = calibration(p, labels)
    assert found["brier"] == pytest.approx(found["reliability"] - found["resolution"] + found["uncertainty"])
    assert found["within"] == pytest.approx(0, abs=1e-12)
    assert found["resolution"] > 0.01


def test_ends_and_edges_are_in_one_bin_each() -> None:
    confidence = torch.tensor([0.0, 0.1, 0.1 + 1e-9, 1.0], dtype=torch.float64)
    found = bins(confidence, torch.tensor([False, False, True, True]))
    assert found.counts.tolist() == [2, 1, 1]
    assert found.confidence.tolist() == pytest.approx([0.05, 0.1, 1.0])
    assert bins(torch.full((7,), 0.5), torch.tensor([True] * 7), 3, equal_mass).counts.tolist() == [7]
    assert sorted(bins(torch.rand(7), torch.tensor([True] * 7), 3, equal_mass).counts.tolist()) == [2, 2, 3]
    assert bins(torch.rand(2), torch.tensor([True, False]), 10, equal_mass).counts.tolist() == [1, 1]


def test_what_is_no_prediction_is_refused() -> None:
    p, labels = draw(5, 3)
    for wrong in (2 * p, p - 0.4, p * torch.nan):
        with pytest.raises(ConfigError, match="row 0 is not a distribution"):
            calibration(wrong, labels)
    with pytest.raises(ConfigError, match="labels go from 0 to 3, and there are 3 classes"):
        calibration(p, torch.tensor([0, 1, 2, 3, 0]))
    for bad in (labels[:3], labels[:, None]):
        with pytest.raises(ShapeError, match=r"probabilities are \(T, C\)"):
            calibration(p, bad)
    with pytest.raises(ConfigError, match="n_bins must be at least 1, got 0"):
        calibration(p, labels, 0)
