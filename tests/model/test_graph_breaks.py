"""Compiled code that breaks in the middle of a base sees the batch in every part: its mask, its tasks, its experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moa
from tests import models

# of PyTorch's own tracing
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


class Broken(nn.Module):
    """A layer behind something that cannot be compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return self.up(x) * attention_mask.unsqueeze(-1)


@pytest.mark.parametrize(
    ("name", "extra"), [("poly", {"task_ids": torch.tensor([1, 0])}), ("topk", {"adapter_ids": torch.tensor([1, -1])})]
)
def test_what_a_batch_says_holds_behind_a_break(name: str, extra: dict[str, Any]) -> None:
    tasks = {"n_tasks": 2} if name == "poly" else {}
    model = models.randomise(moa.build(Broken(), name, n_experts=2, targets=["up"], **tasks)).eval()
    x = torch.randn(2, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), model.tracing() as expected:
        y = model(x, MASK, **extra)
    with torch.no_grad(), model.tracing() as found:
        assert torch.equal(compiled(x, MASK, **extra), y)
    assert len(found) == len(expected) == (name == "poly")
    assert all(torch.equal(one.mask, MASK.bool()) for one in found)
