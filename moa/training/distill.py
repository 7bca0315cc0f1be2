"""One LoRA from a routed mixture: closed form from its average routing, then gradient steps on its own outputs."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from ..errors import ConfigError, FoldError, NumericsError
from ..folding.mean_routing import branch_key, mean_change, mean_routings
from ..merge import Squeezed, squeeze
from ..mixture import Branch, copy_sharing, take_out
from .divergence import check_objective, check_steps, divergence, gap

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

LOSSLESS = 1e-9  # relative error in float64 below which a squeeze has lost nothing


@dataclass(frozen=True, eq=False)
class Distilled:
    """One LoRA per layer in place of a mixture, and what that cost.

    Args:
        model: the base with the LoRA, sharing the frozen weights of the mixture's model.
        errors: layer -> relative error of squeezing its mean change to the rank.
        exact: every routing is constant and the rank holds their sum, so that the closed form is the mixture.
        losses: "mixture", "closed form" and, after gradient steps, "refined" -> mean loss on the data per labelled
            item; empty without labels.
        divergences: "closed form" and "refined" -> mean divergence from the mixture's outputs per row; empty without
            data.
        objective: the divergence, "kl" in nats or "mse" on logits.
    """

    model: MoAModel
    errors: Mapping[str, float]
    exact: bool
    losses: Mapping[str, float]
    divergences: Mapping[str, float]
    objective: str

    def summary(self) -> str:
        """Return the gaps as a table in text."""
        worst = max(self.errors, key=lambda name: self.errors[name])
        lines = [
            f"{len(self.errors)} layers; error of squeezing: largest {self.errors[worst]:.2e} ({worst})"
            + ("; exact" if self.exact else "")
        ]
        if self.divergences:
            lines.append(f"{'':12}{'loss':>10}{'gap':>10}{self.objective + ' to mixture':>18}")
        for stage in ("mixture", *self.divergences) if self.divergences else ():
            loss = self.losses.get(stage)
            cells = f"{'-':>10}{'-':>10}" if loss is None else f"{loss:10.4f}{loss - self.losses['mixture']:+10.4f}"
            lines.append(f"{stage:12}{cells}{self.divergences.get(stage, 0.0):18.3e}")
        return "\n".join(lines)


def distill(
    model: MoAModel,
    rank: int,
    data: Iterable[Mapping[str, Any]] | None = None,
    *,
    task_id: int | None = None,
    steps: int = 0,
    lr: float = 1e-3,
    objective: str = "kl",
    progress: bool = False,
) -> Distilled:
    """Return one LoRA per layer that stands for a mixture.

    Closed form: the rank-r change nearest to Σ_e w̄_e ΔW_e, w̄ the mean weights over the rows of the data. It is the
    mixture itself where routings are constant and the rank is enough, and an approximation elsewhere. Then, if asked,
    AdamW steps on the divergence between the two models' outputs, whose labels are not looked at.

    Args:
        model: the mixture; it is not changed, and runs in eval mode.
        rank: r of the LoRA.
        data: batches of the model's inputs, input_ids (B, S) and so on, on its device; labels, if there, give the gap
            in loss. A list or a DataLoader, as several passes go over it. None is allowed only if all routings are
            constant.
        task_id: the LoRA stands for this task's rows, for routers that look at the task.
        steps: gradient steps, one batch each, the data again from its start where it ends; none are taken where the
            closed form is exact.
        lr: learning rate of the first step, falling to 0 along a cosine.
        objective: "kl": KL(mixture ‖ LoRA) of the softmax of the logits; "mse": mean squared error of the logits.
        progress: show a bar.

    Returns:
        `Distilled`: a new `MoAModel` (router "fixed", one expert), which folds and exports.

    Raises:
        ConfigError: a rank below 1, a lr that is not positive,
            an unknown objective or one that does not fit, steps without data, data that can be gone through only
            once or is empty, or a routing that depends on the input and no data.
        FoldError: experts that are not a weight change, or streams.
        NumericsError: the divergence became NaN or infinite.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}.")
    check_objective(objective, model, "moa.distill")
    check_steps(steps, lr, data)
    if not model.mixtures():
        raise ConfigError("this model has no mixtures to distil.")
    if model.streams is not None:
        raise FoldError("this model runs its batch in several streams, whose outputs no one LoRA gives.")
    was = model.training
    model.eval()
    try:
        student, squeezed, constant = _closed_form(model, rank, data, task_id)
        errors = {name: s.relative for name, s in squeezed.items()}
        exact = constant and max(errors.values()) < LOSSLESS
        losses: dict[str, float] = {}
        divergences: dict[str, float] = {}
        if data is not None:
            losses, divergences["closed form"] = gap(model, student, data, objective, ("mixture", "closed form"))
        if steps and data is not None and not exact:
            _refine(model, student, data, steps, lr, objective, progress)
            refined, divergences["refined"] = gap(model, student, data, objective, ("mixture", "refined"))
            losses |= refined
    finally:
        model.train(was)
    return Distilled(student, errors, exact, losses, divergences, objective)


def _closed_form(
    model: MoAModel, rank: int, data: Iterable[Mapping[str, Any]] | None, task_id: int | None
) -> tuple[MoAModel, dict[str, Squeezed], bool]:
    mixtures = model.mixtures()
    means = mean_routings(model, data, task_id)
    squeezed = {name: squeeze(mean_change(mixture, means), rank) for name, mixture in mixtures.items()}
    constant = all(m.why_not_fold is None for m in mixtures.values()) and all(
        means[branch_key(mixtures[name], branch)].constant for name, branch in model.branches()
    )
    student = _student(model, rank)
    with torch.no_grad():
        for name, mixture in student.mixtures().items():
            branch = mixture.branches[0]
            assert isinstance(branch, Branch)
            factors = branch.bank.factors()
            assert factors is not None
            (down, up), small = factors, squeezed[name].delta
            # rows beyond the change's own rank keep their random start behind a zero up, so that steps can use them
            down[0, : small.rank].copy_(small.down)
            up[0, : small.rank].copy_(small.up.T)
    return student, squeezed, constant


def _student(model: MoAModel, rank: int) -> MoAModel:
    """Return a fresh LoRA on the layers of the mixtures, over a copy of the base that shares its frozen tensors."""
    from ..model.build import build

    base = copy_sharing(model.base, model.modules_to_save)
    take_out(base)
    targets = "|".join(map(re.escape, model.mixtures()))
    student = build(
        base, "fixed", n_experts=1, rank=rank, alpha=rank, targets=targets, modules_to_save=model.modules_to_save
    )
    return student.eval()


def _refine(
    model: MoAModel,
    student: MoAModel,
    data: Iterable[Mapping[str, Any]],
    steps: int,
    lr: float,
    objective: str,
    progress: bool,
) -> None:
    parameters = [p for _, branch in student.branches() for p in branch.bank.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = itertools.chain.from_iterable(itertools.repeat(data))
    bar = tqdm(itertools.islice(batches, steps), total=steps, desc="distil", disable=not progress)
    for number, batch in enumerate(bar):
        with torch.no_grad():
            theirs = model(**batch)
        value = divergence(model, batch, theirs, student(**batch), objective).mean()
        reached = float(value.detach())
        if not math.isfinite(reached):
            raise NumericsError(f"the divergence from the mixture is {reached} at step {number}: lower lr={lr}.")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix({objective: f"{reached:.2e}"})
