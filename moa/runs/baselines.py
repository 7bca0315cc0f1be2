"""What a mixture is measured against: linear heads on the frozen base, and one LoRA of the same active parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..model.heads import TaskHeads
from ..model.host import Host

Scores = dict[str, dict[str, float]]  # task -> measure -> value


def active_parameters(model: Host) -> int:
    """Return how many of the experts' parameters act on one row: Σ over banks of k/E of their number."""
    return round(
        sum(
            branch.router.k / branch.bank.n_experts * sum(p.numel() for p in branch.bank.parameters())
            for _, branch in model.branches()
        )
    )


def matching_rank(model: Host) -> int:
    """Return the rank r of one LoRA whose Σ r (i + o) over the same layers is nearest the active parameters."""
    per_rank = sum(branch.bank.d_in + branch.bank.d_out for _, branch in model.branches())
    return max(1, round(active_parameters(model) / per_rank))


def held_out(n_rows: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return (kept, held out) row numbers of n_rows, at least one each.

    Raises:
        ConfigError: fewer than two rows.
    """
    if n_rows < 2:
        raise ConfigError(f"compare needs at least 2 training rows per task to hold one out, got {n_rows}.")
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).tolist()
    size = min(max(1, round(fraction * n_rows)), n_rows - 1)
    return sorted(order[size:]), sorted(order[:size])


def mean_score(scores: Scores, measure: str) -> float:
    """Return the mean of a measure over tasks."""
    return sum(row[measure] for row in scores.values()) / len(scores)


def pick(candidates: Sequence[float], score: Callable[[float], Scores]) -> tuple[float, list[dict[str, float]]]:
    """Return the candidate of the best mean accuracy (ties: of the lowest mean loss), and what each one scored."""
    rows = []
    for value in candidates:
        scores = score(value)
        rows.append({"value": value, "accuracy": mean_score(scores, "accuracy"), "loss": mean_score(scores, "loss")})
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    return best["value"], rows


class LinearProbe:
    """Logistic regression per task on pooled features of the frozen base: no adapter, no gradient into the base.

    loss = Σ_rows cross-entropy / n + l2/2 · ‖W‖²,  on features standardised by their training mean and deviation

    Args:
        n_labels: classes of each task.
        train: (features (n, d), task ids (n,), labels (n,)).
        l2: strength of the penalty.
    """

    def __init__(self, n_labels: Sequence[int], train: tuple[Tensor, Tensor, Tensor], l2: float) -> None:
        features, task_ids, labels = train
        self.mean, self.deviation = features.mean(0), features.std(0).clamp(min=1e-6)
        self.heads = TaskHeads(features.shape[1], n_labels)
        x = self._scaled(features)
        optimizer = torch.optim.LBFGS(self.heads.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.heads(x, task_ids), labels) + l2 / 2 * self.heads.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def score(self, names: Sequence[str], rows: tuple[Tensor, Tensor, Tensor]) -> Scores:
        """Return accuracy and mean cross-entropy of each task.

        Args:
            names: of the tasks, by id.
            rows: (features (n, d), task ids (n,), labels (n,)).
        """
        features, task_ids, labels = rows
        logits = self.heads(self._scaled(features), task_ids)
        losses = F.cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        return {
            name: {"loss": float(losses[task_ids == t].mean()), "accuracy": float(right[task_ids == t].mean())}
            for t, name in enumerate(names)
        }


def probe(
    n_labels: Mapping[str, int],
    train: tuple[Tensor, Tensor, Tensor],
    evaluation: tuple[Tensor, Tensor, Tensor],
    l2: Sequence[float],
    fraction: float,
    seed: int,
) -> tuple[Scores, dict[str, Any]]:
    """Return the scores of linear heads on frozen features, and how their penalty was picked.

    Args:
        n_labels: task -> number of its classes, by task id.
        train: (features (n, d), task ids (n,), labels (n,)).
        evaluation: the same.
        l2: strengths to pick from.
        fraction: of the training rows, held out for picking.
        seed: of that split.
    """
    names, counts = list(n_labels), list(n_labels.values())
    kept: list[int] = []
    left: list[int] = []
    for t in range(len(names)):
        at = torch.nonzero(train[1] == t).flatten()
        inside, outside = held_out(len(at), fraction, seed)
        kept += at[inside].tolist()
        left += at[outside].tolist()
    inner, outer = [tuple(part[rows] for part in train) for rows in (kept, left)]
    best, tried = pick(l2, lambda value: LinearProbe(counts, inner, value).score(names, outer))  # type: ignore[arg-type]
    scores = LinearProbe(counts, train, best).score(names, evaluation)
    return scores, {"what": "logistic regression per task on frozen pooled features", "l2": best, "tried": tried}
