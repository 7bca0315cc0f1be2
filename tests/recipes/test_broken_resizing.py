"""A broken layer for each law of resizing. Run: pytest tests/recipes/test_broken_resizing.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moa
from moa.experts import ExpertBank, LoRABank
from moa.mixture import Branch
from moa.recipes import Recipe
from moa.routers import LinearRouter

from .recipe_laws import Subject
from .resizing_laws import comes_back, keeps_the_others
from .twins import fails, twin


class ScalesByNumber(ExpertBank):
    """Gives an expert a strength by its number, which is another one when an expert before it is gone."""

    per_expert = ("down", "up")

    def __init__(self, d_in: int, d_out: int, n_experts: int, **options: Any) -> None:
        super().__init__(d_in, d_out, n_experts, **options)
        self.down, self.up = nn.Parameter(torch.randn(n_experts, d_in)), nn.Parameter(torch.zeros(n_experts, d_out))

    def expert_forward(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.down[expert, :, None] * self.up[expert] * (expert + 1)


class DrawsItsGateAnew(LinearRouter):
    """Loses what its gate has learned when the number of experts changes."""

    made_anew = ("weight",)


class GrowsANoisyExpert(LoRABank):
    """Says that it begins at zero, and draws both factors of a new expert."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.up)


def resized(router: type[LinearRouter] = LinearRouter, bank: type[ExpertBank] = LoRABank) -> Subject:
    def build(self: Recipe, site: moa.Site) -> list[Branch]:
        n = self.n_experts
        return [Branch(router(site.d_in, n, 2), bank(site.d_in, site.d_out, n, rank=2))]

    return Subject(twin(build=build))


def test_resizing(tmp_path: Path) -> None:
    fails("expert 2, now 1", keeps_the_others, resized(bank=ScalesByNumber), tmp_path)
    fails("what comes back is another model", comes_back, resized(DrawsItsGateAnew), tmp_path)
    fails("a fresh expert", comes_back, resized(bank=GrowsANoisyExpert), tmp_path)
