"""A smaller base for training: attention heads and feed-forward channels taken out by how much they matter.

Zhang et al. 2025 (LoRAM), arXiv 2502.13533; scores as in Ma et al. 2023 (LLM-Pruner), arXiv 2305.11627.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NumericsError
from ..mixture import backbone_prefix
from ..model.outputs import loss_of
from ..model.pruned import LAYOUTS, Group, check_prunable, groups, kept_of, smaller
from ..model.watched import Batches, in_evaluation, weight_gradients

FIRST, LAST = 4, 2  # blocks at both ends that the paper leaves whole


def prune(
    model: nn.Module,
    ratio: float,
    layers: Sequence[int] | None = None,
    *,
    data: Batches | None = None,
    batches: int = 8,
) -> nn.Module:
    """Return a smaller copy of a model, to train a mixture on; `moa.recover` takes the mixture to the full model.

    Key-value heads go with the query heads that read them, and channels of feed-forward blocks; the hidden size, the
    embeddings and the head stay. What is kept lies in the copy's configuration under `moa_pruned`, which a checkpoint
    of a mixture has in it: `moa.load` reads the full base and prunes it alike. `save_pretrained` of the copy writes a
    folder that `moa.load`, `moa train` and `moa.model.heads.pretrained` read, and no other program.

    A head or channel scores Σ |w| over all its rows and columns, with data Σ |w · ∂loss/∂w|, of the gradient summed
    over batches; in every block the same number goes, those of the lowest scores.

    Args:
        model: a Llama-like or BERT-like model of transformers with its weights in memory; left as it is.
        ratio: share of heads and of channels that goes, rounded down, from 0 to below 1; one of each stays.
        layers: numbers of the blocks that are pruned, -1 the last; default all but the first 4 and the last 2.
        data: batches of its inputs on its device with labels, for scores by gradients.
        batches: how many of them are looked at.

    Raises:
        ConfigError: a ratio or block out of range, a block without what can be pruned, a model that is quantised,
            offloaded, on the meta device, pruned already or carries experts, or data without a loss.
        NumericsError: scores that are not finite.
    Source: arXiv 2502.13533, §2; arXiv 2305.11627, eq. 3 and §3.3.
    Differs: the paper's publisher trains the pruned model a little before it is used; here it is used as it is.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio={ratio} must be from 0 to below 1: the share of heads and channels that goes.")
    if batches < 1:
        raise ConfigError(f"batches must be at least 1, got {batches}.")
    chosen = _chosen(model, layers)
    there = [name for group in chosen for name in group.layers]
    check_prunable(model, there)
    gradients = None if data is None else _gradients(model, there, itertools.islice(data, batches))
    kept = {}
    for group in chosen:
        scores = _scores(model, group, gradients)
        n_kept = max(1, group.n_units - int(ratio * group.n_units + 1e-9))
        numbers = scores.topk(n_kept).indices.sort().values.tolist()
        kept[group.name] = {"of": group.n_units, "kept": numbers}
    return smaller(model, kept)


def _chosen(model: nn.Module, layers: Sequence[int] | None) -> list[Group]:
    """Return the groups of the blocks that are pruned, of a model (B, S) -> its outputs."""
    body = model.get_submodule(backbone_prefix(model).removesuffix("."))
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict") or getattr(body, "config", None) is not config:
        raise ConfigError(
            f"a {type(model).__name__} has no configuration of its body that could hold what is kept: prune a model "
            "of transformers, an encoder before heads or experts are put on it."
        )
    if kept_of(config) is not None:
        raise ConfigError(f"this {type(model).__name__} is pruned already: prune the full one, with a higher ratio.")
    found = groups(model)
    looked_for = "; ".join(f"{one.kind}: {', '.join((*one.outs, one.ins))}" for one in LAYOUTS)
    blocks = _blocks(body, found)
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no block that can be pruned: its linear layers would be ({looked_for})."
        )
    n = len(blocks)
    if layers is None and n <= FIRST + LAST:
        raise ConfigError(
            f"{type(model).__name__} has {n} blocks, and the first {FIRST} and last {LAST} stay whole unless layers "
            "says which blocks are pruned."
        )
    numbers = range(FIRST, n - LAST) if layers is None else sorted({i + n if i < 0 else i for i in layers})
    if not numbers or not all(0 <= i < n for i in numbers):
        raise ConfigError(f"layers={list(layers or ())} must name blocks from 0 to {n - 1}, or -1 and so on for last.")
    chosen = []
    for i in numbers:
        inside = [group for name, group in found.items() if _is_in(name, blocks[i])]
        missing = {"attention", "feed-forward"} - {group.kind for group in inside}
        if missing:
            raise ConfigError(
                f"{blocks[i]} has no {' and no '.join(sorted(missing))} that can be pruned: its linear layers would "
                f"be ({looked_for})."
            )
        chosen += inside
    return chosen


def _blocks(body: nn.Module, found: dict[str, Group]) -> list[str]:
    """Return the names of a body's blocks: of its stack that holds the most of what can be pruned."""
    stacks = [(name, stack) for name, stack in body.named_modules() if isinstance(stack, nn.ModuleList)]
    held = [(sum(_is_in(group, name) for group in found), name, len(stack)) for name, stack in stacks]
    best = max(held, key=lambda row: row[0], default=(0, "", 0))
    return [f"{best[1]}.{i}" for i in range(best[2])] if best[0] else []


def _is_in(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def _gradients(model: nn.Module, layers: Sequence[str], data: Batches) -> dict[str, Tensor]:
    def loss(outputs: Any) -> Tensor:
        found = loss_of(outputs)
        if found is None:
            raise ConfigError("scores by gradients need a loss, and the model gave none: put labels into the batches.")
        return found

    with in_evaluation(model):
        return weight_gradients(model, {name: model.get_submodule(name) for name in layers}, data, loss)


def _scores(model: nn.Module, group: Group, gradients: dict[str, Tensor] | None) -> Tensor:
    """Return what each unit of a group matters, (units,)."""
    total = torch.zeros(group.n_units, dtype=torch.float64)
    for name, axis in group.layers.items():
        weight: Any = model.get_submodule(name).weight
        size = weight.detach().to(torch.float32).abs()  # (o, i)
        if gradients is not None:
            size = size * gradients[name].abs().to(size.device)
        total += size.sum(1 - axis, dtype=torch.float64).unflatten(0, (group.n_units, -1)).sum(1).cpu()
    if not bool(total.isfinite().all()):
        raise NumericsError(f"{group.name}: scores of its units are not finite.")
    return total
