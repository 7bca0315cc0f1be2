"""Poly and MHR: skills mixed in parameter space by a table of tasks.

Ponti et al. 2022, arXiv 2202.13914; Caccia et al. 2023, arXiv 2211.03831.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError
from ..experts import ExpertBank, Headed
from ..mixture import Branch, Site
from ..routers import FixedRouter, TableRouter
from ..routers.table import check_size, check_tasks
from .gates import Fixed
from .recipe import Folds, Recipe, register_recipe

MODES = ("full", "z", "mu")
TABLE = ("n_tasks", "relaxed", "table_lr", "first_task", "unknown_tasks")  # keywords of the table


@register_recipe("poly", "Ponti et al. 2022, arXiv 2202.13914")
@dataclass(frozen=True, kw_only=True)
class Poly(Recipe):
    """A table of task × skill; each example's LoRA has the factors Σ_e w_e A_e and Σ_e w_e B_e.

    The table wants a larger learning rate than the skills: `model.optimizer_groups(lr=1e-3)` gives it its own.

    Args:
        mode: "full" trains table and skills, "z" only the table (for skills trained before), "mu" has no table:
            equal weights, all skills trained; the keywords below are for the other two.
        n_tasks: rows of the table.
        relaxed: relaxed Bernoulli gates in training; False for the plain sigmoid.
        table_lr: learning rate of the table in `MoAModel.optimizer_groups`.
        first_task: the lowest task id.
        unknown_tasks: "error", or "uniform" weights for tasks out of range.

    Source: arXiv 2202.13914, eq. 1-5; microsoft/mttl at mhr-camera-ready.
    Differs: the released code rounds nothing in training by default, as here; its
        options (straight-through rounding, L2 norm, shared skill) are left out. alpha = 1 as released: s = 1/r.
    """

    families = ("lora",)

    n_tasks: int = 1
    mode: Literal["full", "z", "mu"] = "full"
    relaxed: bool = True
    table_lr: float = 0.1
    first_task: int = 0
    unknown_tasks: Literal["error", "uniform"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(map(repr, MODES))}, got {self.mode!r}.")
        check_tasks(self.n_tasks, self.unknown_tasks)
        check_size("n_heads", self.heads)
        if self.mode == "mu":
            self.check_unused("a table, which mode='mu' does not have", *TABLE)

    @property
    def heads(self) -> int:
        """H."""
        return 1

    def scaling(self) -> float:
        """Return alpha / rank, with alpha = 1 unless given."""
        return (1.0 if self.alpha is None else self.alpha) / self.largest_rank

    def bank(self, site: Site) -> ExpertBank:
        """Return a fresh bank for a site, (*rows, i) -> (*rows, o), frozen in mode "z".

        Raises:
            ConfigError: the heads do not divide the site's features.
        """
        family = Headed(n_heads=self.heads)
        bank = family.build(site, self.n_experts, site.shared.get("experts"), **self.bank_options())
        return bank.requires_grad_(self.mode != "z")

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: the table, or equal weights, over the skills of a layer on x (*rows, i)."""
        if self.mode == "mu":
            return [Branch(FixedRouter(site.d_in, self.n_experts), self.bank(site))]
        table = TableRouter(
            site.d_in,
            self.n_experts,
            self.n_tasks,
            n_heads=self.heads,
            relaxed=self.relaxed,
            learning_rate=self.table_lr,
            first_task=self.first_task,
            unknown=self.unknown_tasks,
        )
        return [Branch(table, self.bank(site))]

    @property
    def folds(self) -> Folds:
        """Every input of one task has the same skills in a layer (*rows, i) -> (*rows, o), in mode "mu" all inputs."""
        return "always" if self.mode == "mu" else "by task"

    def adapted(self, new_task: int, mode: str, collapse: bool = False) -> Recipe:
        """Return the recipe that learns one new task from this one's skills.

        Raises:
            ConfigError: an unknown mode, or a collapse in another mode than "mu".
        """
        if mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}.")
        if mode == "mu" and not collapse:  # without a table: its keywords are as they were by default
            without = {field.name: field.default for field in dataclasses.fields(self) if field.name in TABLE}
            return dataclasses.replace(self, mode=mode, **without)  # type: ignore[arg-type]
        if not collapse:
            return dataclasses.replace(self, n_tasks=1, first_task=new_task, mode=mode)  # type: ignore[arg-type]
        if mode != "mu":
            raise ConfigError(f"collapse=True needs equal weights, mode='mu', got mode={mode!r}.")
        alpha = 1.0 if self.alpha is None else self.alpha
        kept = ("rank", "dropout", "targets", "exclude", "layers", "layers_pattern", "engine")
        return Fixed(alpha=alpha, **{name: getattr(self, name) for name in kept})

    @torch.no_grad()
    def carry_over(self, old: Sequence[Branch], new: Sequence[Branch]) -> None:
        """Copy the skills, or their mean where the new branch holds one LoRA, down (E, r, i) and up (E, r, o)."""
        source, target = old[0].bank, new[0].bank
        if target.n_experts == 1:
            uniform = torch.full((source.n_experts,), 1.0 / source.n_experts)
            target.read(0, source.mixed_delta(uniform.to(next(source.parameters()).device)))
        else:
            target.load_state_dict(source.state_dict())


@register_recipe("mhr", "Caccia et al. 2023, arXiv 2211.03831")
@dataclass(frozen=True, kw_only=True)
class MHR(Poly):
    """Poly with the features cut into heads, each routed by its own row of the table.

    Args:
        n_heads: H, dividing the features of every target layer; 1 is Poly.

    Source: arXiv 2211.03831, §3; MHR-z is mode="z", MHR-mu mode="mu" (then `adapt(…, collapse=True)` for one LoRA).
    Differs: the paper's T0 runs have 64 heads of rank 1; 4 is the default here because it divides most layers.
    """

    n_heads: int = 4

    @property
    def heads(self) -> int:
        """H."""
        return self.n_heads
