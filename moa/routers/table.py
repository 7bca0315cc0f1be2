"""Routing by the task of an example: a row of a table, or a gate on a task embedding.

Ponti et al. 2022 (Poly), arXiv 2202.13914; Caccia et al. 2023 (MHR), arXiv 2211.03831; Liu et al. 2023 (MOELoRA),
arXiv 2310.18339.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..types import Context, Routing
from .router import Router

EPS = 1e-12  # of the released normalisation


class TaskRouter(Router):
    """What routers by task share: all rows of an example have its task's routing, rows (B, 1, …).

    Args:
        d_in: i, unused; every router has it.
        n_experts: E.
        n_tasks: number of tasks.
        first_task: the lowest task id.
        unknown: "error", or "uniform": tasks out of range, and batches without task ids, get equal weights.

    Raises:
        ConfigError: n_tasks < 1 or an unknown fallback.
    """

    per_row = False
    rowwise = False

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        n_tasks: int,
        *,
        first_task: int = 0,
        unknown: Literal["error", "uniform"] = "error",
    ) -> None:
        super().__init__(d_in, n_experts, n_experts)
        check_tasks(n_tasks, unknown)
        self.n_tasks, self.first_task, self.unknown = n_tasks, first_task, unknown
        self.tasks = range(first_task, first_task + n_tasks)
        self.known_tasks = self.tasks if unknown == "error" else None

    def task_logits(self) -> Tensor:
        """Return the logits of every task, (N, E) or (N, H, E) for N tasks and H heads."""
        raise NotImplementedError

    def weigh(self, logits: Tensor, training: bool) -> Tensor:
        """Return the weights (*rows, E) of logits (*rows, E), with the noise of training or without."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing of x (*rows, i): weights (B, 1, …, E), or (B, 1, …, H, E) with heads."""
        if context.task_ids is None and self.unknown == "uniform":
            return Routing(self._uniform(x.device), None, self.n_experts)
        ids = context.task_rows(x, self.known_tasks) - self.first_task
        logits = self.task_logits()[ids.clamp(0, self.n_tasks - 1)]  # (B, 1, …, E), or (B, 1, …, H, E)
        if self.unknown == "uniform":
            known = ((ids >= 0) & (ids < self.n_tasks)).reshape(*ids.shape, *([1] * (logits.ndim - ids.ndim)))
            logits = torch.where(known, logits, 0)  # equal logits give equal weights
        weights = self.weigh(logits, self.training)
        return Routing(weights, None, self.n_experts, logits, weights)

    def constant(self, task: int | None = None) -> Routing | None:
        """Return one task's routing of rows (), or (H,) with heads, as in evaluation; None if no task is named."""
        if task is None or (task not in self.tasks and self.unknown == "error"):
            return None
        if task not in self.tasks:
            return Routing(self._uniform(), None, self.n_experts)
        return Routing(self.weigh(self.task_logits()[task - self.first_task], False), None, self.n_experts)

    def _uniform(self, device: torch.device | None = None) -> Tensor:
        return torch.full((self.n_experts,), 1.0 / self.n_experts, device=device)

    def extra_repr(self) -> str:
        """Return the sizes that `repr` shows."""
        return f"n_experts={self.n_experts}, tasks={self.first_task} to {self.tasks.stop - 1}, unknown={self.unknown!r}"


class TableRouter(TaskRouter):
    """A learned row of logits for each task and head; sigmoid, then normalised to sum one.

    w = g / (Σ_e g_e + 1e-12);  g = sigmoid(Z) in evaluation, sigmoid(Z + logit(u)), u ~ U(0, 1), in training

    | parameter | shape | start |
    |---|---|---|
    | table (Z) | (N, H, E) | uniform ±1e-3 |

    Args:
        d_in: i, unused.
        n_experts: E, the skills.
        n_tasks: N.
        n_heads: H; with 1 the routing has no head axis.
        relaxed: draw from a relaxed Bernoulli of temperature 1 in training; False is the plain sigmoid.
        learning_rate: of the table, see `MoAModel.optimizer_groups`.
        first_task, unknown: as in `TaskRouter`.

    Raises:
        ConfigError: n_tasks or n_heads < 1.
    Source: arXiv 2202.13914, eq. 4-5; arXiv 2211.03831, §3; microsoft/mttl at mhr-camera-ready.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"table": 2}

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        n_tasks: int,
        *,
        n_heads: int = 1,
        relaxed: bool = True,
        learning_rate: float | None = 0.1,
        first_task: int = 0,
        unknown: Literal["error", "uniform"] = "error",
    ) -> None:
        super().__init__(d_in, n_experts, n_tasks, first_task=first_task, unknown=unknown)
        check_size("n_heads", n_heads)
        self.n_heads, self.relaxed, self.learning_rate = n_heads, relaxed, learning_rate
        self.table = nn.Parameter(torch.empty(n_tasks, n_heads, n_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table (N, H, E) anew, close to zero: every task starts with nearly equal weights."""
        nn.init.uniform_(self.table, -1e-3, 1e-3)

    def task_logits(self) -> Tensor:
        """Return the table (N, H, E), or (N, E) with one head."""
        table = self.table.to(torch.promote_types(self.table.dtype, torch.float32))
        return table.squeeze(1) if self.n_heads == 1 else table

    def weigh(self, logits: Tensor, training: bool) -> Tensor:
        """Return sigmoid gates (*rows, E), noisy in training, divided by their sum."""
        if training and self.relaxed:
            eps = torch.finfo(logits.dtype).eps
            uniform = torch.rand_like(logits).clamp(eps, 1 - eps)
            logits = logits + uniform.log() - (-uniform).log1p()
        gates = logits.sigmoid()  # (*rows, E)
        return gates / (gates.sum(-1, keepdim=True) + EPS)


class TaskEmbeddingRouter(TaskRouter):
    """Softmax of a linear gate on a learned embedding of the task: w = softmax(G e_task).

    | parameter | shape | start |
    |---|---|---|
    | embedding | (N, d_embedding) | N(0, 1) |
    | weight (G) | (E, d_embedding) | uniform ±1/√d_embedding |

    Args:
        d_in: i, unused.
        n_experts: E.
        n_tasks: N.
        d_embedding: size of an embedding.
        losses: name -> coefficient, see `moa.objective.losses.LOSSES`.
        first_task, unknown: as in `TaskRouter`.

    Raises:
        ConfigError: n_tasks or d_embedding < 1.
    Source: arXiv 2310.18339, eq. 6-7.
    """

    per_expert: ClassVar[Mapping[str, int]] = {"weight": 0}

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        n_tasks: int,
        *,
        d_embedding: int = 64,
        losses: dict[str, float] | None = None,
        first_task: int = 0,
        unknown: Literal["error", "uniform"] = "error",
    ) -> None:
        super().__init__(d_in, n_experts, n_tasks, first_task=first_task, unknown=unknown)
        check_size("d_embedding", d_embedding)
        self.loss_weights = {name: c for name, c in (losses or {}).items() if c}
        self.embedding = nn.Parameter(torch.empty(n_tasks, d_embedding))
        self.weight = nn.Parameter(torch.empty(n_experts, d_embedding))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw embedding (N, d_embedding) and weight (E, d_embedding) anew."""
        nn.init.normal_(self.embedding)
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def task_logits(self) -> Tensor:
        """Return G e for every task, (N, E)."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.embedding.to(dtype) @ self.weight.to(dtype).T

    def weigh(self, logits: Tensor, training: bool) -> Tensor:
        """Return the softmax (*rows, E)."""
        return logits.softmax(-1)


def check_tasks(n_tasks: int, unknown: str) -> None:
    """Check how many tasks there are, and what the others get.

    Raises:
        ConfigError: n_tasks < 1, or an unknown fallback.
    """
    check_size("n_tasks", n_tasks)
    if unknown not in ("error", "uniform"):
        raise ConfigError(f"unknown must be 'error' or 'uniform', got {unknown!r}.")


def check_size(name: str, value: int) -> None:
    """Check that a number of heads, tasks or features is at least 1.

    Raises:
        ConfigError: it is not.
    """
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, got {value}.")
