"""How far a classifier's probabilities can be believed: calibration errors, the Brier score and its parts.

Guo et al. 2017, arXiv 1706.04599 (ECE, MCE); Nixon et al. 2019, arXiv 1904.01685 (ACE, thresholds, by class);
Brier 1950; Murphy 1973 (its decomposition).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError

SUM = 1e-3  # how far from 1 the probabilities of a row may add up to


@dataclass(frozen=True)
class Bins:
    """Predictions by confidence, lowest first; a bin that holds none is left out.

    Attributes:
        counts: (N,) predictions in each bin.
        confidence: (N,) their mean probability, fp64.
        accuracy: (N,) how often they come true, fp64.
    """

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def gaps(self) -> Tensor:
        """|accuracy - confidence| of each bin (N,)."""
        return (self.accuracy - self.confidence).abs()

    def error(self) -> float:
        """Return the gaps' mean, each weighed by its bin's predictions (N,)."""
        return ((self.gaps * self.counts).sum() / self.counts.sum()).item() if len(self.counts) else 0.0

    def worst(self) -> float:
        """Return the largest gap of a bin (N,)."""
        return self.gaps.max().item() if len(self.counts) else 0.0


def equal_width(confidence: Tensor, n_bins: int) -> Tensor:
    """Return the bin of each confidence (T,): N intervals of one width, (0, 1/N], (1/N, 2/N], …; 0 is in the first."""
    edges = torch.linspace(0, 1, n_bins + 1, dtype=confidence.dtype, device=confidence.device)[1:-1]
    return torch.bucketize(confidence.contiguous(), edges)


def equal_mass(confidence: Tensor, n_bins: int) -> Tensor:
    """Return the bin of each confidence (T,): N bins of one size, but for equal confidences, which stay together."""
    place = torch.searchsorted(confidence.sort().values, confidence.contiguous())  # how many lie below
    return place * n_bins // max(len(confidence), 1)


Binning = Callable[[Tensor, int], Tensor]


def bins(confidence: Tensor, true: Tensor, n_bins: int = 10, binning: Binning = equal_width) -> Bins:
    """Return predictions by confidence.

    Args:
        confidence: (T,) probabilities.
        true: (T,) bool, whether each came true.
        n_bins: N.
        binning: `equal_width` or `equal_mass`.

    Raises:
        ConfigError: N below 1.
        ShapeError: of other shapes.
    """
    if n_bins < 1:
        raise ConfigError(f"n_bins must be at least 1, got {n_bins}.")
    if confidence.ndim != 1 or confidence.shape != true.shape:
        raise ShapeError(f"confidence and true are (T,), got {tuple(confidence.shape)} and {tuple(true.shape)}.")
    confidence = confidence.double()
    number = binning(confidence, n_bins)  # (T,)
    counts = torch.bincount(number, minlength=n_bins)
    held = counts > 0
    sums = [torch.bincount(number, values, n_bins)[held] for values in (confidence, true.double())]
    return Bins(counts[held], sums[0] / counts[held], sums[1] / counts[held])


def calibration(probabilities: Tensor, labels: Tensor, n_bins: int = 10, threshold: float = 0.01) -> dict[str, float]:
    """Return how well the probabilities of a classifier are calibrated; 0 is perfect in every measure.

    - `ece`: |accuracy - confidence| of the predicted class over bins of one width, weighed by their size.
    - `mce`: the largest of these gaps.
    - `ace`: as `ece`, over bins of one size.
    - `class_ece`: as `ece`, of each class's probability against whether it is the label; the mean over classes.
    - `tace`: as `class_ece` over bins of one size, of the probabilities of at least `threshold` only.
    - `brier`: Σ_c (p_c - [c is the label])², the mean over rows, from 0 to 2.
    - `reliability`, `resolution`, `uncertainty`: brier = reliability - resolution + uncertainty, but for what the bins
      of one width hide, `within`, which is the rest of it.

    Args:
        probabilities: (T, C), rows that add up to 1.
        labels: (T,) int64.
        n_bins: N.
        threshold: of `tace`.

    Raises:
        ShapeError: of other shapes, or without a row.
        ConfigError: labels outside the classes, numbers that are not probabilities.
    Source: arXiv 1706.04599, eq. 3 and 5; arXiv 1904.01685, §3; Murphy 1973, eq. 13, summed over classes.
    Differs: HypeLoRA's code flattens probabilities by row and labels by class in its thresholded error, so that a
        perfect predictor does not score 0; its ACE is of the predicted class, as here, and not by class.
    """
    _check(probabilities, labels)
    p = probabilities.detach().double()
    confidence, predicted = p.max(-1)  # (T,)
    right = predicted == labels
    truth = torch.nn.functional.one_hot(labels, p.shape[1]).bool()  # (T, C)
    top = bins(confidence, right, n_bins)
    by_class = [bins(p[:, c], truth[:, c], n_bins) for c in range(p.shape[1])]
    kept = [p[:, c] >= threshold for c in range(p.shape[1])]
    above = [bins(p[k, c], truth[k, c], n_bins, equal_mass) for c, k in enumerate(kept)]
    rates = truth.double().mean(0)  # (C,)
    n_rows = len(p)
    reliability = sum((b.counts * b.gaps**2).sum().item() for b in by_class) / n_rows
    resolution = sum(
        (b.counts * (b.accuracy - rate) ** 2).sum().item() for b, rate in zip(by_class, rates, strict=True)
    )
    uncertainty = (rates * (1 - rates)).sum().item()
    brier = ((p - truth.double()) ** 2).sum(-1).mean().item()
    return {
        "ece": top.error(),
        "mce": top.worst(),
        "ace": bins(confidence, right, n_bins, equal_mass).error(),
        "class_ece": sum(b.error() for b in by_class) / len(by_class),
        "tace": sum(b.error() for b in above) / len(above),
        "brier": brier,
        "reliability": reliability,
        "resolution": resolution / n_rows,
        "uncertainty": uncertainty,
        "within": brier - (reliability - resolution / n_rows + uncertainty),
    }


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ShapeError(
            f"probabilities are (T, C) and labels (T,), T at least 1, got {tuple(probabilities.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ConfigError(
            f"labels go from {labels.min().item()} to {labels.max().item()}, and there are {probabilities.shape[1]} "
            "classes."
        )
    sums = probabilities.double().sum(-1)
    fits = ((sums - 1).abs() <= SUM) & (probabilities >= 0).all(-1)
    if not fits.all():
        row = int((~fits).int().argmax())
        raise ConfigError(
            f"row {row} is not a distribution: it adds up to {sums[row].item():.4g}, its smallest value is "
            f"{probabilities[row].min().item():.4g}. Pass probabilities, e.g. logits.softmax(-1)."
        )
