"""The routing that a mixture's rows get on average over data, and the one weight change that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..merge import Delta
from ..mixture import Branch, Mixture
from ..mixture.change import Change, factor_change, mixed
from ..objective.trace import Record

Key = tuple[str, int]


@dataclass(frozen=True, eq=False)
class MeanRouting:
    """What a branch's rows get on average.

    Args:
        weights: (E,) or (H, E) float64, mean weight of each expert, 0 in rows that did not choose it.
        chosen: the same shape, share of the rows that chose it.
        constant: every row gets exactly this, so that nothing is lost by averaging.
    """

    weights: Tensor
    chosen: Tensor
    constant: bool


def mean_routings(
    model: Any, batches: Iterable[Mapping[str, Any]] | None, task_id: int | None = None
) -> dict[Key, MeanRouting]:
    """Return the mean routing of every branch: from the router where it is constant, else over the rows of batches.

    Args:
        model: in eval mode; padding is left out of the mean, and a routing per example counts once per token.
        batches: inputs of the model, input_ids (B, S) and so on; None where every routing is constant.
        task_id: the rows are all of this task, for routers that look at it.

    Returns:
        `branch_key(mixture, branch)` -> its mean.

    Raises:
        ConfigError: a routing depends on the input and there are no batches, or none of their rows reached it.
    """
    mixtures = model.mixtures()
    found: dict[Key, MeanRouting] = {}
    wanted: dict[Key, Branch] = {}
    for name, branch in model.branches():
        routing = branch.router.constant(task_id)
        key = branch_key(mixtures[name], branch)
        if routing is not None:
            weights = routing.dense().detach().double()
            found[key] = MeanRouting(weights, routing.selected().double(), True)
        else:
            wanted.setdefault(key, branch)
    if wanted and batches is None:
        name = next(n for n, b in model.branches() if b.router.constant(task_id) is None)
        raise ConfigError(
            f"{name}: its routing depends on the input, so it has to be averaged over data: pass data=, batches of "
            "the model's inputs (or task_id=, where the routing is by task)."
        )
    sums: dict[Key, list[Any]] = {key: [0.0, 0.0, 0.0] for key in wanted}
    for batch in batches or () if wanted else ():
        with torch.no_grad(), model.tracing() as trace:
            model(**batch)
        for record in trace:
            key = _record_key(mixtures[record.name], record)
            if key in wanted:
                heads = getattr(wanted[key].bank, "n_heads", 1) > 1
                sums[key] = [a + b for a, b in zip(sums[key], _sums(record, heads), strict=True)]
    for key, (total, times, rows) in sums.items():
        if float(rows) == 0:
            raise ConfigError(f"no row of the data reached the router of {key[0]}: there is nothing to average.")
        found[key] = MeanRouting(total / rows, times / rows, False)
    return found


def branch_key(mixture: Mixture, branch: Branch) -> Key:
    """Return what names the routing of a branch, for rows (*rows, i): where it is decided, and which it is there."""
    number = next(i for i, own in enumerate(mixture.branches) if own is branch)
    return mixture.decided_at, number


def _record_key(mixture: Mixture, record: Record) -> Key:
    number = next(i for i, own in enumerate(mixture.branches) if own.router is record.router)
    return mixture.decided_at, number


def _sums(record: Record, heads: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over counted rows of the weights and of the choices, (E,) or (H, E), and how many they are."""
    weights, chosen = record.routing.dense().double(), record.routing.selected().double()
    n_axes = max(weights.ndim - 1 - heads, 0)
    mask = record.mask
    if mask is None or mask.ndim != n_axes or n_axes == 0:
        count = weights.new_tensor(weights.shape[:n_axes].numel())
        axes = tuple(range(n_axes))
        return (weights.sum(axes), chosen.sum(axes), count) if axes else (weights, chosen, count)
    counted = mask.double().reshape(*mask.shape, *([1] * (weights.ndim - n_axes)))
    axes = tuple(range(n_axes))
    return (counted * weights).sum(axes), (counted * chosen).sum(axes), mask.sum()


@torch.no_grad()
def mean_change(mixture: Mixture, means: Mapping[Key, MeanRouting]) -> Delta:
    """Return Σ_e w̄_e ΔW_e of a layer, (o, i) in float64, as factors where the experts have them.

    Experts that are mixed in parameter space are averaged there. FlyLoRA's rank-one experts: B diag(p) A with p the
    share of the rows that chose each. A branch on the layer's output y0 = W x: its change times W.

    Args:
        mixture: the layer, (*rows, i) -> (*rows, o).
        means: of `mean_routings`.

    Raises:
        FoldError: the experts are not a weight change, or add a constant, which a LoRA has no place for.
    """

    def mean(branch: Branch) -> Change:
        found = means[branch_key(mixture, branch)]
        weights = found.chosen if branch.bank.carries_input else found.weights
        return mixed(branch.bank, weights.to(next(branch.bank.parameters()).device))

    return factor_change(mixture, mean)
