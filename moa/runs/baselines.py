"""What a mixture is measured against: linear heads on the frozen base, and one LoRA of the same active parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..model.host import Host
from ..model.task_heads import IGNORED, TaskHeads, label_losses
from .encode import EncodedTask
from .metrics import measures_of

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
    """Return the candidate of the best mean accuracy (ties: of the lowest mean loss), and what each one scored.

    Where a task has no accuracy, it is the one of the lowest mean loss.
    """
    rows = []
    for value in candidates:
        scores = score(value)
        shared = [name for name in ("accuracy", "loss") if all(name in row for row in scores.values())]
        rows.append({"value": value, **{name: mean_score(scores, name) for name in shared}})
    best = max(rows, key=lambda row: (row.get("accuracy", 0.0), -row["loss"]))
    return best["value"], rows


class LinearProbe:
    """Logistic or linear regression per task on pooled features of the frozen base: no adapter, no gradient into it.

    loss = mean over labels of cross-entropy or squared error + l2/2 · ‖W‖²,  on features standardised by their
    training mean and deviation

    Args:
        tasks: whose labels are predicted, by id.
        train: (features (n, d), task ids (n,), labels (n,) or (n, L)).
        l2: strength of the penalty.
    """

    def __init__(self, tasks: Sequence[EncodedTask], train: tuple[Tensor, Tensor, Tensor], l2: float) -> None:
        features, task_ids, labels = train
        self.tasks = tasks
        numbers = torch.tensor([task.kind == "regression" for task in tasks])[task_ids]
        self.mean, self.deviation = features.mean(0), features.std(0).clamp(min=1e-6)
        self.heads = TaskHeads(features.shape[1], [len(task.labels) for task in tasks])
        x = self._scaled(features)
        optimizer = torch.optim.LBFGS(self.heads.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = label_losses(self.heads(x, task_ids), labels, numbers)
            loss = losses.sum() / (labels != IGNORED).sum() + l2 / 2 * self.heads.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    def _scaled(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def score(self, rows: tuple[Tensor, Tensor, Tensor]) -> Scores:
        """Return the measures of each task on rows: (features (n, d), task ids (n,), labels (n,) or (n, L))."""
        features, task_ids, labels = rows
        logits = self.heads(self._scaled(features), task_ids)
        scores = {}
        for t, task in enumerate(self.tasks):
            measures, own = measures_of(task.kind, task.labels), task_ids == t
            kept = [part.numpy() for part in measures.keep(logits[own], labels[own])]
            scores[task.name] = measures.scores(kept, labels[own].numpy())
        return scores


def probe(
    tasks: Sequence[EncodedTask],
    train: tuple[Tensor, Tensor, Tensor],
    evaluation: tuple[Tensor, Tensor, Tensor],
    l2: Sequence[float],
    fraction: float,
    seed: int,
) -> tuple[Scores, dict[str, Any]]:
    """Return the scores of linear heads on frozen features, and how their penalty was picked.

    Args:
        tasks: with labels, by id.
        train: (features (n, d), task ids (n,), labels (n,) or (n, L)).
        evaluation: the same.
        l2: strengths to pick from.
        fraction: of the training rows, held out for picking.
        seed: of that split.
    """
    kept: list[int] = []
    left: list[int] = []
    for t in range(len(tasks)):
        at = torch.nonzero(train[1] == t).flatten()
        inside, outside = held_out(len(at), fraction, seed)
        kept += at[inside].tolist()
        left += at[outside].tolist()
    inner, outer = [tuple(part[rows] for part in train) for rows in (kept, left)]
    kinds = {task.kind for task in tasks}
    best, tried = pick(l2, lambda value: LinearProbe(tasks, inner, value).score(outer))  # type: ignore[arg-type]
    scores = LinearProbe(tasks, train, best).score(evaluation)
    models = [name for name, kind in (("logistic", "classification"), ("linear", "regression")) if kind in kinds]
    what = f"{' or '.join(models)} regression per task on frozen pooled features"
    return scores, {"what": what, "l2": best, "tried": tried}
