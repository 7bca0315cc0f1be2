"""How far one model's outputs are from another's, row by row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError, unknown_name
from ..model.inputs import describe_batch
from ..model.outputs import logits_of, loss_of
from ..types import Context

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

OBJECTIVES = ("kl", "mse")


def check_objective(objective: str, teacher: MoAModel, where: str) -> None:
    """Refuse an objective that is unknown, or that says nothing of a teacher's outputs (B, C).

    Raises:
        ConfigError: it is one of these.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(unknown_name("objective", objective, OBJECTIVES, where))
    if objective == "kl" and gives_numbers(teacher):
        raise ConfigError("this model gives numbers, of which a softmax says nothing: set objective='mse'.")


def check_steps(steps: int, lr: float, data: Any) -> None:
    """Refuse numbers out of range, and data that is not several batches, of any shape, to go over again.

    Raises:
        ConfigError: it is one of these.
    """
    if steps < 0 or (steps and data is None):
        raise ConfigError(f"steps={steps}: gradient steps need data and cannot be negative.")
    if not 0 < lr < math.inf:
        raise ConfigError(f"lr must be a positive number, got {lr}.")
    if isinstance(data, Iterator):
        raise ConfigError("data is an iterator, which can be gone through once: pass a list or a DataLoader.")
    if data is not None and next(iter(data), None) is None:
        raise ConfigError("data holds no batch.")


@torch.no_grad()
def gap(
    teacher: MoAModel,
    student: MoAModel,
    data: Iterable[Mapping[str, Any]],
    objective: str,
    names: tuple[str, str],
) -> tuple[dict[str, float], float]:
    """Return both models' mean losses per label, by their names, and their divergence per row.

    Args:
        teacher: in evaluation mode.
        student: in evaluation mode.
        data: batches, input_ids (B, S) and so on, with or without labels.
        objective: one of `OBJECTIVES`.
        names: of the two; the losses are empty without labels.
    """
    losses = dict.fromkeys(names, 0.0)
    items, total, rows = 0, 0.0, 0
    for batch in data:
        theirs, ours = teacher(**batch), student(**batch)
        count = labelled(teacher, batch.get("labels"))
        for name, outputs in zip(names, (theirs, ours), strict=True):
            loss = loss_of(outputs)
            if count and loss is not None:
                losses[name] += float(loss) * count
        items += count if loss_of(theirs) is not None else 0
        per_row = divergence(teacher, batch, theirs, ours, objective)
        total += float(per_row.double().sum())
        rows += per_row.numel()
    return {name: loss / items for name, loss in losses.items()} if items else {}, total / max(rows, 1)


def labelled(model: MoAModel, labels: Any) -> int:
    """Return how many labels a batch's mean loss is over, so that batches of unlike sizes weigh as they should."""
    if not isinstance(labels, Tensor):
        return 0
    if labels.is_floating_point():
        return labels.shape[0]
    return int(((labels[:, 1:] if labels.ndim == 2 and model._shifts() else labels) != -100).sum())


def gives_numbers(model: MoAModel) -> bool:
    """Tell whether outputs (B, C) of a model are numbers to regress, at least those of some tasks."""
    config = model.config
    if getattr(config, "regressions", ()) or getattr(config, "problem_type", None) == "regression":
        return True
    return "ForSequenceClassification" in type(model.base).__name__ and getattr(config, "num_labels", 2) == 1


def divergence(model: MoAModel, batch: Mapping[str, Any], theirs: Any, ours: Any, objective: str) -> Tensor:
    """Return the divergence of each row that counts, (n,), between a teacher's outputs and those of another model.

    Args:
        model: the teacher.
        batch: that both were given.
        theirs: the teacher's outputs.
        ours: the other's.
        objective: "kl": KL(teacher ‖ other) of the softmax of the logits; "mse": mean squared error of the logits.

    Raises:
        ConfigError: no logits, or logits of other sizes.
    """
    target, logits = (out if isinstance(out, Tensor) else logits_of(out) for out in (theirs, ours))
    if not isinstance(target, Tensor) or not isinstance(logits, Tensor):
        raise ConfigError(f"a {type(model.base).__name__} returns no logits: there are no outputs to compare.")
    if target.shape != logits.shape:
        raise ConfigError(
            f"the teacher's logits are {tuple(target.shape)} and the student's {tuple(logits.shape)}: both must have "
            "one vocabulary, or one set of classes."
        )
    wide = torch.promote_types(target.dtype, torch.float32)
    target, logits, there = target.to(wide), logits.to(wide), torch.isfinite(target)  # heads lack some outputs: −∞
    if objective == "kl":
        log_p, log_q = F.log_softmax(target, -1), F.log_softmax(logits, -1)
        per_row = torch.where(there, log_p.exp() * (log_p - log_q), 0).sum(-1)
    else:
        per_row = torch.where(there, logits - target, 0).square().sum(-1) / there.sum(-1)
    told = describe_batch(batch, kind=model._kind(), labels=batch.get("labels"))
    mask = Context(masks=(*told.decoder, *told.attention)).mask_for(target)
    return per_row[mask] if mask is not None else per_row.reshape(-1)
