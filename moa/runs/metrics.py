"""How well a run does: predictions without keeping logits, and accuracy of classes or of whole answers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

IGNORED = -100
Z = 1.959963984540054  # the 97.5 % quantile of the standard normal


def best_ids(logits: Any, labels: Tensor) -> Tensor:
    """Return the best class of each example (B,), or the best next token of each position (B, S).

    Given to Trainer as preprocess_logits_for_metrics, so that logits are not kept.

    Args:
        logits: (B, C) or (B, S, V), or a tuple that starts with them.
        labels: unused.
    """
    first: Tensor = logits[0] if isinstance(logits, tuple) else logits
    return first.argmax(-1)


def exact_match(prediction: Any) -> dict[str, float]:
    """Return the accuracy: share of examples whose class, or whose whole answer, is right.

    An answer is right when each of its tokens, the end included, is the most likely one after those before it: then,
    and only then, greedy decoding writes it.

    Args:
        prediction: Trainer's pair of best ids and labels, both (n,) or both (n, S).
    """
    best, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if labels.ndim == 2:
        best, labels = best[:, :-1], labels[:, 1:]
        right = ((best == labels) | (labels == IGNORED)).all(1)
    else:
        right = best == labels
    return {"accuracy": float(right.mean())}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Return the ends of the 95 % Wilson interval of a share of n rows; it does not shrink to nothing at 0 or 1.

    centre = (p + z²/2n) / (1 + z²/n);  half = z √(p(1 - p)/n + z²/4n²) / (1 + z²/n)

    Args:
        share: p, e.g. an accuracy.
        n: rows.

    Source: Wilson 1927, doi 10.1080/01621459.1927.10502953.
    """
    spread = 1 + Z**2 / n
    centre = (share + Z**2 / (2 * n)) / spread
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / spread
    return max(0.0, centre - half), min(1.0, centre + half)
