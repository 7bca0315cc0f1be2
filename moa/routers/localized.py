"""A dense gate whose load balance depends on the kind of task. Dou et al. 2023 (LoRAMoE), arXiv 2312.09979."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..types import Context, Routing
from .linear import LinearRouter


class LocalizedRouter(LinearRouter):
    """A softmax over all experts; the first half of them is meant for tasks of kind 0, the rest for kind 1.

    In training its routing's usage is w_e · (1 − δ) where an expert is meant for the row's kind of task and
    w_e · (1 + δ) elsewhere. The "localized" loss is least where the usage is even: where an expert that is meant for a
    kind gets (1 + δ) / (1 − δ) times the weight of one that is not.

    Args:
        d_in: i.
        n_experts: E.
        task_kinds: the kind, 0 or 1, of each task id; empty where every task is of one kind.
        delta: δ in [0, 1).
        options: as in `LinearRouter`.

    Raises:
        ConfigError: δ out of range, or a kind that is neither 0 nor 1.
    Source: arXiv 2312.09979, eq. 5-7.
    Differs: the text has the signs of δ the other way round, which drives weight away from the experts that match; the
        released code labels the halves so that its effect is the one described here.
    """

    fixed_size = "each half of its experts is meant for one kind of task"
    kinds: Tensor

    def __init__(
        self, d_in: int, n_experts: int, *, task_kinds: tuple[int, ...] = (), delta: float = 0.1, **options: Any
    ) -> None:
        super().__init__(d_in, n_experts, n_experts, **options)
        check_kinds(task_kinds, delta)
        self.delta = delta
        self.register_buffer("kinds", torch.tensor(task_kinds, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): all experts, and in training the usage (*rows, E)."""
        routing = super().forward(x, context)
        if not self.training or not self.loss_weights:
            return routing
        weights = routing.weights  # (*rows, E)
        if not self.kinds.numel():
            return self._with_usage(routing, weights)
        kind = self.kinds[context.task_rows(x, range(self.kinds.numel()))]  # (B, 1, …)
        meant_for = (torch.arange(self.n_experts, device=x.device) >= self.n_experts / 2).long()  # (E,)
        fits = kind.unsqueeze(-1) == meant_for  # (B, 1, …, E)
        usage = weights * torch.where(fits, 1 - self.delta, 1 + self.delta)
        return self._with_usage(routing, usage)

    @staticmethod
    def _with_usage(routing: Routing, usage: Tensor) -> Routing:
        weights, indices, n_experts, logits, scores, log_prob, _ = routing.given
        return Routing(weights, indices, n_experts, logits, scores, log_prob, usage)


def check_kinds(task_kinds: tuple[int, ...], delta: float) -> None:
    """Check the kind of each task, and δ.

    Raises:
        ConfigError: δ outside [0, 1), or a kind that is neither 0 nor 1.
    """
    if not 0 <= delta < 1:
        raise ConfigError(f"delta must be in [0, 1), got {delta}.")
    if not set(task_kinds) <= {0, 1}:
        raise ConfigError(f"task_kinds must hold 0 or 1 for each task, got {task_kinds}.")
