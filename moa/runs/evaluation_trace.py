"""The routings of an evaluation: counted as they are made, each example once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model.moa_model import MoAModel
from ..monitor.statistics import RoutingStatistics
from ..objective.trace import Record
from ..rows import in_streams
from ..types import Routing


class EvaluationTrace:
    """Counts routings as they are made, and keeps none of them.

    Args:
        model: whose context says the tasks of a batch.
        statistics: counts.
        accelerator: that gives several processes their batches. It fills up the last ones with examples that another
            process has: they are not counted again.
    """

    def __init__(self, model: MoAModel, statistics: RoutingStatistics, accelerator: Any = None) -> None:
        self.model, self.statistics, self.accelerator = model, statistics, accelerator

    def add(self, layer: Any, routing: Routing, mask: Tensor | None, router: nn.Module, n_streams: int) -> None:
        """Count one routing of weights (*rows, K); the context's task ids have as many rows as its n streams."""
        rows, task_ids = routing.weights.shape[:-1], self.model.context.task_ids
        n_own = self._n_own(0 if task_ids is None else len(task_ids))
        if task_ids is not None and n_own < len(task_ids) and rows and rows[0] % (len(task_ids) * n_streams) == 0:
            own = in_streams(torch.arange(len(task_ids), device=routing.weights.device) < n_own, n_streams)
            own = own.repeat_interleave(rows[0] // len(own)).view(-1, *[1] * (len(rows) - 1)).expand(rows)  # (*rows,)
            mask = own if mask is None or mask.shape != rows else mask & own
        self.statistics.add([Record(layer, routing, mask, router)], task_ids)

    def _n_own(self, n_examples: int) -> int:
        """Return how many of the first of a batch's n examples no other process has."""
        if self.accelerator is None:
            return n_examples
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return n_examples
        return max(0, min(n_examples, state.remainder - self.accelerator.process_index * n_examples))
