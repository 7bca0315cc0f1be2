"""How far the probabilities of a run's classifiers can be believed: kept while scoring, measured, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, shown
from ..monitor.calibration import bins, calibration
from .metrics import Array, Classes, first_of

N_BINS = 10
# measure -> its title
TITLES = {
    "ece": "ECE",
    "class_ece": "class-wise ECE",
    "mce": "MCE",
    "ace": "ACE",
    "tace": "TACE",
    "brier": "Brier",
    "reliability": "reliability",
    "resolution": "resolution",
    "uncertainty": "uncertainty",
    "within": "within bins",
}


def check_classify(kinds: Mapping[str, str]) -> None:
    """Check that every task has probabilities to calibrate.

    Args:
        kinds: task -> kind.

    Raises:
        ConfigError: one of them does not classify.
    """
    for name, kind in kinds.items():
        if kind != "classification":
            raise ConfigError(
                f"--calibration is of classes, and task {name!r} is of {kind}: it has no probability of a label. "
                "Leave --calibration out, or give a configuration (--config) whose tasks all classify."
            )


class CalibratedClasses(Classes):
    """The scores of classes, and the calibration of the probabilities that they were chosen by.

    Args:
        n_classes: C of the task; a model's logits may be wider, for tasks with more.
    """

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.found: dict[str, Any] = {}

    def keep(self, logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the best class and the loss (B,), and probabilities (B, C), of logits (B, ≥C) and labels (B,)."""
        own = first_of(logits)[:, : self.n_classes].float()
        return (*super().keep(logits, labels), F.softmax(own, -1))

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return the scores of best classes, losses (n,), probabilities (n, C); `found` then has their calibration."""
        probabilities = torch.from_numpy(np.asarray(kept[2]))
        true = torch.from_numpy(np.asarray(labels).reshape(len(labels), -1)[:, 0].astype(np.int64))
        confidence, predicted = probabilities.max(-1)
        drawn = bins(confidence, predicted == true, N_BINS)
        self.found = {
            **calibration(probabilities, true, N_BINS),
            "bins": {
                "counts": drawn.counts.tolist(),
                "confidence": drawn.confidence.tolist(),
                "accuracy": drawn.accuracy.tolist(),
            },
        }
        return super().scores(kept[:2], labels)


def calibration_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the calibration of each task as text: a line a task, a column a measure.

    Args:
        found: task -> what `evaluate` has under "calibration".
    """
    names = [shown(task, 40) for task in found]
    width = max(len("calibration"), *map(len, names))
    lines = ["  ".join([f"{'calibration':<{width}}", *TITLES.values()])]
    for name, row in zip(names, found.values(), strict=True):
        cells = [f"{row[measure]:.3f}".rjust(len(title)) for measure, title in TITLES.items()]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    return "\n".join([*lines, "Brier = reliability - resolution + uncertainty + within bins; 0 is perfect calibration"])
