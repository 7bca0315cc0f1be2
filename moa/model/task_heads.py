"""Linear heads for several tasks in one, and the losses of what they give: classes or numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ShapeError

IGNORED = -100


class TaskHeads(nn.Module):
    """N linear heads in one: logits_b = W[task_b] h_b + b[task_b], −∞ for outputs that the task does not have.

    | tensor | shape | start |
    |---|---|---|
    | weight | (N, C, d) | normal, σ = 0.02 |
    | bias | (N, C) | zero |
    | present (buffer) | (N, C) bool | which outputs each task has |

    Args:
        d_in: d.
        n_labels: outputs of each task, its classes or its numbers; C is the largest.

    Raises:
        ConfigError: no task, or a task without an output.
    """

    present: Tensor

    def __init__(self, d_in: int, n_labels: Sequence[int]) -> None:
        super().__init__()
        if not n_labels or min(n_labels) < 1:
            raise ConfigError(f"each task needs at least 1 output, got {list(n_labels)}.")
        self.n_labels = list(n_labels)
        self.weight = nn.Parameter(torch.empty(len(n_labels), max(n_labels), d_in))
        self.bias = nn.Parameter(torch.empty(len(n_labels), max(n_labels)))
        self.register_buffer("present", torch.empty(len(n_labels), max(n_labels), dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight (N, C, d) anew, set bias to zero, mark the outputs present."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            counts = torch.tensor(self.n_labels, device=self.present.device)
            self.present.copy_(torch.arange(self.present.shape[1], device=self.present.device) < counts[:, None])

    def forward(self, h: Tensor, task_ids: Tensor) -> Tensor:
        """Return logits (B, C) of pooled features h (B, d) for tasks (B,)."""
        n_tasks, n_classes, _ = self.weight.shape
        # every head on every row, then the row's own: one product, and a backward without scattered additions
        every = F.linear(h.to(self.weight.dtype), self.weight.flatten(0, 1), self.bias.flatten()).view(
            -1, n_tasks, n_classes
        )
        own = every.gather(1, task_ids[:, None, None].expand(-1, 1, n_classes)).squeeze(1)
        return own.masked_fill(~self.present[task_ids], float("-inf"))


def label_losses(logits: Tensor, labels: Tensor, numbers: Tensor) -> Tensor:
    """Return the loss of every label (B, L), 0 where it is -100: a class's cross-entropy, a number's squared error.

    Args:
        logits: (B, C), −∞ for outputs that a row's task does not have.
        labels: (B,) or (B, L), L at most C; a class is in the first place, as a whole number of any dtype.
        numbers: (B,) bool, True where the labels are numbers to regress.

    Raises:
        ShapeError: more labels than outputs.
    """
    labels = labels[:, None] if labels.ndim == 1 else labels
    if labels.shape[1] > logits.shape[1]:
        raise ShapeError(f"labels {tuple(labels.shape)} have more places than the {logits.shape[1]} outputs.")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes = torch.where(numbers, IGNORED, labels[:, 0]).long()  # (B,)
    counted = (labels != IGNORED) & numbers[:, None]
    errors = torch.where(counted, logits[:, : labels.shape[1]] - labels.to(logits.dtype), 0).square()
    return torch.cat([errors[:, :1] + F.cross_entropy(logits, classes, reduction="none")[:, None], errors[:, 1:]], 1)
