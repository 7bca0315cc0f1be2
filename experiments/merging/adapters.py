"""The kinds of adapters that are compared, how one is trained on one task, and what is left of it: plain tensors."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import moa
from moa.experts import LoRABank, VectorBank
from moa.mixture.mixture import Branch
from moa.model.heads import MultiTaskForSequenceClassification
from moa.recipes import Recipe, Site, make_recipe
from moa.routers import LinearRouter, ProjectionRouter

from .data import Rows, by_length, collate


@dataclass(frozen=True, kw_only=True)
class SplitLoRA(Recipe):
    """A LoRA of rank 32 cut into 4 experts of rank 8; a learned gate picks one per row: w = sigmoid(top-1(W_g x)).

    Source: the split-LoRA baseline of arXiv 2510.08396. One active expert gives its stated share of active parameters.
    """

    n_experts: int = 4
    k: int = 1
    rank: int = 8

    def build(self, site: Site) -> list[Branch]:
        """Return one branch: a gate on x (*rows, i)."""
        router = LinearRouter(site.d_in, self.n_experts, self.k, score="sigmoid", renormalize=False)
        return [Branch(router, self.bank(site))]


KINDS = ("lora_r8", "lora_r32", "split_lora", "flylora_shared", "flylora_independent")


def recipe(kind: str, seed: int, task: int) -> Recipe:
    """Return the recipe of a kind of adapter; FlyLoRA's projections have one seed for all tasks, or each its own."""
    if kind == "split_lora":
        return SplitLoRA()
    if kind.startswith("flylora"):
        own = seed if kind == "flylora_shared" else 1000 * (task + 1) + seed
        return make_recipe("flylora", rank=32, k=8, seed=own)
    return make_recipe("fixed", n_experts=1, rank=int(kind.removeprefix("lora_r")))


@dataclass(frozen=True)
class Adapter:
    """What one training leaves: factors of every layer, and the task's head.

    Args:
        layers: layer -> down (E, r, i), up (E, r, o) with the scale; of split-LoRA also gate (E, i), of FlyLoRA
            bias (r,), where E is 1 and the rank-one experts are the r directions.
        weight: of the head, (C, d).
        bias: of the head, (C,).
    """

    layers: dict[str, dict[str, Tensor]]
    weight: Tensor
    bias: Tensor


def train(
    base: MultiTaskForSequenceClassification,
    kind: str | None,
    task: int,
    rows: Rows,
    *,
    rate: float,
    head_rate: float,
    epochs: int,
    size: int,
    seed: int,
) -> nn.Module:
    """Return a copy of the base with an adapter trained on one task, its head too.

    AdamW without weight decay, linear decay to zero, gradients clipped to norm 1. The start is the same for every task
    of a seed, as where one script trains them all; so LoRA's down factors start equal.

    Args:
        base: pretrained, fresh heads.
        kind: of adapter; None trains the head alone.
        task: its id, which head is used.
        rows: to learn from.
        rate: learning rate of the adapter.
        head_rate: of the head.
        epochs: passes over the rows.
        size: rows per batch.
        seed: of the start and the order.
    """
    torch.manual_seed(seed)
    model: nn.Module = copy.deepcopy(base)
    if kind is None:
        model.requires_grad_(False)
        model.heads.requires_grad_(True)  # type: ignore[union-attr]
    else:
        model = moa.build(model, recipe(kind, seed, task))
    groups: list[dict[str, object]] = [{"params": [], "lr": rate}, {"params": [], "lr": head_rate}]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups["heads." in name]["params"].append(parameter)  # type: ignore[attr-defined]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    total = epochs * -(-len(rows) // size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
    order = random.Random(seed)
    model.train()
    for _ in range(epochs):
        batches = list(by_length(rows, size))
        order.shuffle(batches)
        for part in batches:
            model(**collate(part)).loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def take(model: moa.MoAModel, task: int) -> Adapter:
    """Return what training left in a model: factors (E, r, i) and (E, r, o) of each layer, and the task's head."""
    layers = {}
    for name, branch in model.branches():
        bank, router = branch.bank, branch.router
        if isinstance(bank, VectorBank):
            assert isinstance(router, ProjectionRouter) and router.selection_bias is not None
            own = {"down": router.projection[None], "up": bank.up[None] * bank.scaling, "bias": router.selection_bias}
        else:
            assert isinstance(bank, LoRABank)
            own = {"down": bank.down, "up": bank.up * bank.scaling}
            if isinstance(router, LinearRouter):
                own["gate"] = router.weight
        layers[name] = {key: value.detach().clone() for key, value in own.items()}
    heads = model.base.heads
    return Adapter(layers, heads.weight[task].detach().clone(), heads.bias[task].detach().clone())  # type: ignore
