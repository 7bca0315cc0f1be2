"""Which entries of a weight sparse experts train: those whose gradient, or weight times gradient, is largest.

SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175) with the criterion of SNIP (Lee et al. 2018, arXiv 1810.02340).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from ..experts.families import ShiRABank
from ..experts.families.shira import largest_places
from ..layers import is_conv1d


def choose_entries(
    model: Any, batches: Iterable[Mapping[str, Tensor]], by: Literal["gradient", "snip"] = "gradient"
) -> None:
    """Set the places of sparse experts, (E, n) a layer, by the frozen base's gradients on data; nothing is returned.

    The largest entries are dealt out to a layer's experts in turn. Call it before training, on experts built with
    mask="given", which a checkpoint keeps.

    Args:
        model: a `MoAModel` with experts of the family "shira"; its values are set to zero.
        batches: inputs with labels, input_ids (B, S) and so on; their gradients are summed.
        by: "gradient" is |g|, "snip" |W0 ⊙ g|.

    Raises:
        ConfigError: no such experts, places that a seed or the weight gives, a base without dense weights, or no batch.

    Source: arXiv 2406.13175, §3.1, SHiRA-Grad and SHiRA-SNIP.
    """
    if by not in ("gradient", "snip"):
        raise ConfigError(f"by must be 'gradient' or 'snip', got {by!r}.")
    banks = {name: branch.bank for name, branch in model.branches() if isinstance(branch.bank, ShiRABank)}
    if not banks:
        raise ConfigError("this model has no experts of the family 'shira', whose entries could be chosen.")
    weights: dict[str, Tensor] = {}
    for name, bank in banks.items():
        mixture = model.mixtures()[name]
        base = mixture.base
        if "places" in bank._non_persistent_buffers_set:
            raise ConfigError(
                f"{name}: the places of its experts come from a seed or the weight: build with mask='given'."
            )
        if not mixture.is_dense():
            raise ConfigError(f"{name}: a {type(base).__name__} holds no dense weight at hand to take a gradient of.")
        weights[name] = base.weight
    before = {name: weight.requires_grad for name, weight in weights.items()}
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    count = 0
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            with model.disable_adapter():
                loss = model(**batch).loss
            for name, grad in zip(sums, torch.autograd.grad(loss, list(weights.values())), strict=True):
                sums[name] += grad
            count += 1
    finally:
        for name, weight in weights.items():
            weight.requires_grad_(before[name])
    if not count:
        raise ConfigError("no batch was given: there is no gradient to choose entries by.")
    for name, bank in banks.items():
        base = model.mixtures()[name].base
        score = sums[name] * base.weight.detach() if by == "snip" else sums[name]
        rows = score.T if is_conv1d(base) else score.flatten(1)  # (o, i)
        bank.places.copy_(largest_places(rows.abs(), bank.n_experts, bank.places.shape[1]))
        bank.reset_parameters()
