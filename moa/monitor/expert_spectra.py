"""The spectra of a model's experts, layer by layer: directions used, directions shared, and those of their mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..delta import Delta, LowRank, total
from ..errors import FoldError
from ..model.moa_model import MoAModel
from .spectra import directions_used, effective_rank, entropy, profile, singular_values, subspaces, subspaces_alike

SHIFTED = "a vector that the router weighs by its product with x: it has no rank of its own"
LARGEST = 2**20  # entries of a change that is not of low rank, and whose profile takes an SVD at every cut


@dataclass(frozen=True)
class LayerSpectra:
    """How many directions the experts of one layer use, and how far they share them.

    Args:
        ranks: effective rank of each expert; 0 for one that changes nothing.
        entropies: singular entropy of each, in nats.
        outputs: for every pair of experts that change something, how alike their column spaces are, from 0 to 1.
        inputs: the same of their row spaces.
        shape: (o, i) of their changes.
        profile: cut -> entropy there, in nats, the mean over the experts that change something; empty for changes that
            are not of low rank and have more than `LARGEST` entries.
        mixed: effective rank of the routed mean change; None where the routing is not known.
        mixed_profile: the profile of that change; empty where there is none.
        routing: "constant", or "load" where the experts are weighed by their measured load; "" where it is not known.
        why_not: why none of it can be said; "" where it can.
    """

    ranks: Sequence[float] = ()
    entropies: Sequence[float] = ()
    outputs: Sequence[float] = ()
    inputs: Sequence[float] = ()
    shape: tuple[int, ...] = ()
    profile: Mapping[int, float] = field(default_factory=dict)
    mixed: float | None = None
    mixed_profile: Mapping[int, float] = field(default_factory=dict)
    routing: str = ""
    why_not: str = ""


@torch.no_grad()
def expert_spectra(model: MoAModel, loads: Mapping[str, Tensor] | None = None) -> dict[str, LayerSpectra]:
    """Return the spectra of every layer's experts; a layer of several banks has a name for each, "layer [1]", ….

    Args:
        model: whose experts are weight changes; a layer whose are not says so.
        loads: layer -> (E,) measured load, for routings that depend on the input: their mean change is taken to be
            Σ_e load_e ΔW_e.
    """
    found: dict[str, LayerSpectra] = {}
    for layer, branch in model.branches():
        name = layer if layer not in found else f"{layer} [{sum(key.startswith(layer + ' [') for key in found) + 1}]"
        bank = branch.bank
        if bank.carries_input:
            found[name] = LayerSpectra(why_not=f"an expert is {SHIFTED}")
            continue
        try:
            changes = [bank.delta(expert) for expert in range(bank.n_experts)]
        except FoldError as error:
            found[name] = LayerSpectra(why_not=str(error))
            continue
        constant = branch.router.constant()
        weights, routing = (None, "") if constant is None else (constant.dense().reshape(-1), "constant")
        if weights is None and loads is not None and name in loads:
            weights, routing = loads[name], "load"
        if weights is not None and len(weights) != len(changes):  # heads, or several matrices of one layer
            weights, routing = None, ""
        found[name] = _of(changes, None if weights is None else _mean(changes, weights), routing)
    return found


def _mean(changes: Sequence[Delta], weights: Tensor) -> Delta:
    """Return Σ_e w_e ΔW_e (o, i) of changes (o, i) and weights (E,)."""
    return total([change.scaled(weight) for change, weight in zip(changes, weights.tolist(), strict=True)])


def _of(changes: Sequence[Delta], mixed: Delta | None, routing: str) -> LayerSpectra:
    """Return the spectra of changes, (o, i) each."""
    values = [singular_values(change) for change in changes]
    bases = [subspaces(change) for change in changes]
    used = [(outputs, inputs) for outputs, inputs in bases if outputs.shape[1]]
    pairs = [(a, b) for n, a in enumerate(used) for b in used[:n]]
    profiles = [_profile(change) for change, own in zip(changes, values, strict=True) if own.any()]
    return LayerSpectra(
        ranks=[directions_used(own) for own in values],
        entropies=[entropy(own) for own in values],
        outputs=[subspaces_alike(a[0], b[0]) for a, b in pairs],
        inputs=[subspaces_alike(a[1], b[1]) for a, b in pairs],
        shape=tuple(changes[0].shape),
        profile={cut: sum(own[cut] for own in profiles) / len(profiles) for cut in profiles[0]} if profiles else {},
        mixed=None if mixed is None else effective_rank(mixed),
        mixed_profile={} if mixed is None else _profile(mixed),
        routing=routing,
    )


def _profile(change: Delta) -> dict[int, float]:
    """Return the profile of a change (o, i), or none of one that would take too long."""
    few = isinstance(change, LowRank) or change.shape.numel() <= LARGEST
    return profile(change) if few else {}
