"""How well a run does on the rows of one task, with standard errors: classes, numbers, or whole answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..model.task_heads import label_losses

IGNORED = -100
Z = 1.959963984540054  # the 97.5 % quantile of the standard normal
ERROR = "_error"  # after a measure's name: its standard error
Array = NDArray[Any]


class Measures(Protocol):
    """How one kind of task is scored, see `moa.runs.tasks.MEASURES`."""

    def keep(self, logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return what of a batch's outputs (B, …) the scores need, for Trainer's preprocess_logits_for_metrics."""

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return the measures of n rows and their standard errors, which one row does not have.

        Args:
            kept: what `keep` gave, (n, …) each.
            labels: (n, …).
        """


def measures_of(kind: str, names: Sequence[str] = ()) -> Measures:
    """Return how a kind of task is scored.

    Args:
        kind: as in `moa.runs.encode.EncodedTask`.
        names: of the numbers to regress.
    """
    if kind == "classification":
        return Classes()
    if kind == "regression":
        return Numbers(names)
    return Texts() if kind == "text" else Answers()


def mean_with_error(name: str, values: Array) -> dict[str, float]:
    """Return the mean of values (n,) under a name, and its standard error s/√n."""
    out = {name: float(values.mean())}
    if len(values) > 1:
        out[name + ERROR] = float(values.std(ddof=1) / math.sqrt(len(values)))
    return out


def first_of(outputs: Any) -> Tensor:
    """Return the logits of a model's outputs: the first of several."""
    first: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return first


class Classes:
    """Accuracy, and the mean cross-entropy."""

    def keep(self, logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the best class and the loss of each row, (B,) both, of logits (B, C) and labels (B,) or (B, 1)."""
        logits = first_of(logits)
        none = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        return logits.argmax(-1), label_losses(logits, labels, none).sum(1)

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return accuracy and loss of best classes and losses (n,), and labels (n,) or (n, 1)."""
        best, losses = kept
        right = (best == labels.reshape(len(labels), -1)[:, 0]).astype(float)
        return {**mean_with_error("accuracy", right), **mean_with_error("loss", losses)}


@dataclass(frozen=True)
class Numbers:
    """RMSE, MAE, correlations and the mean squared error, each the mean over the outputs, and of each output.

    Args:
        outputs: their names, L of them.
    """

    outputs: Sequence[str]

    def keep(self, logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the numbers (B, C) that are predicted."""
        return (first_of(logits),)

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return the measures of predictions (n, C) against labels (n,) or (n, L).

        SE(RMSE) = SE(MSE) / 2 RMSE;  SE(r) = (1 − r²) √((1 + r²/2 for ranks) / (n − 3))

        A correlation with what is constant does not exist, and is left out.

        Source: delta method; Fisher 1921 and, for ranks, Bonett & Wright 2000, doi 10.1007/BF02294183.
        """
        wide = len(self.outputs)
        truth = labels.reshape(len(labels), -1)[:, :wide].astype(np.float64)
        guess = kept[0].reshape(len(truth), -1)[:, :wide].astype(np.float64)
        errors = guess - truth
        rmse = np.sqrt((errors**2).mean(0))  # (L,)
        out = mean_with_error("rmse", (errors**2 / np.where(rmse > 0, 2 * rmse, 1)).mean(1)) | {"rmse": rmse.mean()}
        out |= mean_with_error("mae", np.abs(errors).mean(1))
        correlations = {
            "pearson": [pearson(*pair) for pair in zip(guess.T, truth.T, strict=True)],
            "spearman": [pearson(ranks(x), ranks(y)) for x, y in zip(guess.T, truth.T, strict=True)],
        }
        for name, found in correlations.items():
            known = [r for r in found if r is not None]
            if len(known) == wide:
                out[name] = sum(known) / wide
                if len(truth) > 3:
                    widths = [(1 - r**2) * math.sqrt(1 + r**2 / 2 if name == "spearman" else 1) for r in known]
                    out[name + ERROR] = sum(widths) / wide / math.sqrt(len(truth) - 3)
        out |= mean_with_error("loss", (errors**2).mean(1))
        if wide > 1:
            mae = np.abs(errors).mean(0)
            for i, output in enumerate(self.outputs):
                own = {"rmse": rmse[i], "mae": mae[i], **{name: row[i] for name, row in correlations.items()}}
                out |= {f"{name}.{output}": value for name, value in own.items() if value is not None}
        return {name: float(value) for name, value in out.items()}


def pearson(x: Array, y: Array) -> float | None:
    """Return the correlation of x and y (n,); None where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float((x**2).sum() * (y**2).sum()))
    return float(np.clip((x * y).sum() / size, -1, 1)) if size > 0 else None


def ranks(x: Array) -> Array:
    """Return the ranks (n,) of values (n,), from 1 on; equal ones share the mean of theirs."""
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    shared: Array = (np.cumsum(counts) - (counts - 1) / 2)[place.reshape(-1)]
    return shared


class Answers:
    """Share of whole answers that are right, and the mean cross-entropy of the learned tokens.

    An answer is right when each of its tokens, the end included, is the most likely one after those before it: then,
    and only then, greedy decoding writes it.
    """

    def keep(self, logits: Any, labels: Tensor) -> tuple[Tensor, ...]:
        """Return the best next tokens (B, S), and the sum of each row's losses (B,), of logits (B, S, V)."""
        logits = first_of(logits)
        sums = [  # a row at a time: all at once would hold the logits in float32 once more
            F.cross_entropy(row[:-1].float(), own[1:], ignore_index=IGNORED, reduction="sum")
            for row, own in zip(logits, labels, strict=True)
        ]
        return logits.argmax(-1), torch.stack(sums)

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return accuracy, and loss R = Σ_i s_i / Σ_i m_i over rows of m_i learned tokens whose losses add up to s_i.

        SE(R)² = n/(n − 1) · Σ_i (s_i − R m_i)² / (Σ_i m_i)²: rows, not tokens, are independent.

        Args:
            kept: best next tokens (n, S), sums of losses (n,).
            labels: (n, S), -100 where nothing is learned.

        Source: Cochran, Sampling Techniques, 3rd ed., eq. 6.13 (the ratio estimator).
        """
        best, sums = kept
        labels = labels[:, 1:]
        counts = (labels != IGNORED).sum(1)
        loss, n_rows = sums.sum() / counts.sum(), len(sums)
        right = ((best[:, :-1] == labels) | (labels == IGNORED)).all(1).astype(float)
        out = mean_with_error("accuracy", right) | {"loss": float(loss)}
        if n_rows > 1:
            spread = ((sums - loss * counts) ** 2).sum() * n_rows / (n_rows - 1)
            out["loss" + ERROR] = float(np.sqrt(spread) / counts.sum())
        return out


class Texts(Answers):
    """The mean cross-entropy of the learned tokens: a whole text is never right."""

    def scores(self, kept: Sequence[Array], labels: Array) -> dict[str, float]:
        """Return the loss of `Answers`, of best next tokens (n, S) and sums of losses (n,), and labels (n, S)."""
        return {name: value for name, value in super().scores(kept, labels).items() if name.startswith("loss")}


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
