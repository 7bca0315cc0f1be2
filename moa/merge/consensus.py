"""Summing deltas entry by entry: plainly, or only where signs agree (the three functions known as TIES).

Task arithmetic (arXiv 2212.04089); TIES (arXiv 2306.01708), as PEFT 0.21 and as mergekit's guide define it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError, unknown_name

DEFINITIONS = ("paper", "peft", "mergekit")
VOTES = ("total", "count")

# Below this, the sum of agreeing weights cannot divide: the plain sum stays.
MIN_DIVISOR = 1e-8


def weighted_sum(stream: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Σ_t w_t δ_t, one delta in memory at a time.

    Args:
        stream: the deltas, all of one shape.
        weights: one number each.

    Returns:
        A new tensor of that shape.

    Raises:
        ConfigError: not as many weights as deltas, or none.

    Source: Ilharco et al. 2022, arXiv 2212.04089.
    """
    total: Tensor | None = None
    count = 0
    for delta in stream:
        if count < len(weights):
            total = delta * weights[count] if total is None else total.add_(delta, alpha=weights[count])
        count += 1
    if total is None or count != len(weights):
        raise ConfigError(f"weighted_sum: {len(weights)} weights for {count} deltas; expected one each, at least one.")
    return total


def agreeing_sum(
    stream: Callable[[], Iterable[Tensor]],
    weights: Sequence[float],
    definition: str = "paper",
    *,
    vote: str = "total",
    normalize: bool = True,
) -> Tensor:
    """Return the combination of the entries whose sign is the elected one, by one of three definitions.

    With γ the elected sign of an entry and A = {t: sgn = γ}:
    paper: γ = sgn Σ δ_t; Σ_{t∈A} w δ_t / |A|, one w for all (λ);
    peft: γ = + if Σ δ_t ≥ 0 else -; Σ_{t∈A} w_t δ_t / |A|;
    mergekit: γ = + if Σ w_t δ_t ≥ 0 else -, sgn taken of w_t δ_t; Σ_{t∈A} w_t δ_t / Σ_{t∈A} w_t.

    Args:
        stream: starts a new pass over the (sparsified) deltas, all of one shape; called twice.
        weights: one number per delta.
        definition: "paper", "peft" or "mergekit".
        vote: what elects: "total" the sum, as above, or "count" the sum of the signs, as PEFT's "frequency".
        normalize: for mergekit's, divide by the sum of agreeing weights; False leaves the sum.

    Returns:
        A new tensor of that shape.

    Raises:
        ConfigError: an unknown definition or vote; unequal weights with the paper's, which has none per task.

    Source: Yadav et al. 2023, arXiv 2306.01708, Algorithm 1 (elect, disjoint merge); PEFT 0.21 `merge_utils`;
        mergekit's guide (ties).
    Differs: the paper's released code gives an exact tie the majority sign of the whole vector; here, as in the
        paper's formula, nobody agrees with sign 0 and the entry is 0. mergekit divides by every sum of agreeing
        weights but an exact 0, also by one that is rounding (weights 0.1, 0.2, -0.3); here one below 1e-8 does not
        divide. mergekit takes differences and sums in the checkpoint's type; here in float32 at least.
    """
    if definition not in DEFINITIONS:
        raise ConfigError(unknown_name("definition", definition, DEFINITIONS, "sign agreement"))
    if vote not in VOTES:
        raise ConfigError(unknown_name("vote", vote, VOTES, "sign agreement"))
    if definition == "paper" and len(set(weights)) > 1:
        raise ConfigError(
            f"TIES as its paper defines it has one scale and no weight per task, but weights are {list(weights)}: "
            "give equal ones, or choose definition='peft' or 'mergekit', which weight the agreeing entries."
        )
    weighted = definition == "mergekit"
    ones = [1.0] * len(weights)
    factors = weights if weighted else ones
    if vote == "total":
        elected = torch.sign(weighted_sum(stream(), factors))
    else:
        elected = torch.sign(weighted_sum((torch.sign(d * f) for d, f in zip(stream(), factors, strict=True)), ones))
    if definition != "paper":
        elected = torch.where(elected == 0, torch.ones_like(elected), elected)
    total, divisor = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta, weight in zip(stream(), weights, strict=True):
        # γ · δ is positive where signs agree, so its positive part is the agreeing magnitude: no masks, which are slow.
        part = (delta * weight if weighted else delta).mul(elected).relu_()
        divisor.add_(torch.sign(part), alpha=weight if weighted else 1.0)
        total.add_(part, alpha=1.0 if weighted else weight)
    total *= elected
    if weighted:
        if not normalize:
            return total
        return total / torch.where(divisor.abs() < MIN_DIVISOR, torch.ones_like(divisor), divisor)
    return total / divisor.clamp(min=1.0)
