"""Which layer gets how much rank: importance by the loss's gradient, ranks within a budget of parameters."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import Site
from ..mixture.sites import find_sites
from ..model.moa_model import MoAModel
from ..model.watched import weight_gradients
from ..recipes import Recipe, make_recipe


@dataclass(frozen=True)
class RankPlan:
    """Ranks within a budget.

    Args:
        ranks: by layer; a layer that is not among them gets no experts.
        importance: by layer, the squared norm of the loss's gradient to its weight.
        parameters: of one LoRA expert in every layer, Σ r (i + o).
        budget: that was given.
    """

    ranks: dict[str, int]
    importance: dict[str, float]
    parameters: int
    budget: int

    def recipes(self, router: str = "topk", **options: Any) -> list[Recipe]:
        """Return the recipes of `moa.build`, one for each rank; no tensors.

        Args:
            router: name of a recipe.
            options: its other keywords; rank and targets are the plan's.

        Raises:
            ConfigError: keywords that the recipe does not have, or rank or targets among them.
        """
        for name in ("rank", "targets"):
            if name in options:
                raise ConfigError(f"{name}={options[name]!r}: a plan says where experts sit and of which rank.")
        layers: dict[int, list[str]] = {}
        for name, rank in self.ranks.items():
            layers.setdefault(rank, []).append(name)
        return [make_recipe(router, rank=r, targets=tuple(names), **options) for r, names in sorted(layers.items())]


def allocate_ranks(
    model: nn.Module,
    data: Iterable[Mapping[str, Any]],
    budget: int,
    *,
    targets: str | tuple[str, ...] = "all-linear",
    least: int = 0,
    most: int = 64,
    loss: Callable[[Any], Tensor] | None = None,
) -> RankPlan:
    """Return ranks for a model's layers whose LoRA experts have at most a number of parameters.

    With G (o, i) the gradient of the loss to a layer's weight, summed over the data, and σ_j its singular values, the
    j-th unit of rank catches σ_j² of ‖G‖² and costs i + o; what catches most per parameter comes first, and where two
    layers are level, the one with the lower rank.

    Args:
        model: without mixtures; its weights stay as they are. One gradient of each layer is held on the host, in fp32.
        data: batches, keywords of the model, with labels.
        budget: parameters of one expert in all layers together.
        targets: as in `moa.build`.
        least: rank that every layer gets.
        most: rank that none is above.
        loss: of the model's outputs, (); None: their `loss`.

    Raises:
        ConfigError: a budget, least or most out of range, a budget below what `least` costs, no data, a model with
            mixtures or on the meta device, a layer that the data never reaches, outputs without a loss.
        NumericsError: a gradient with NaN or infinity, by layer.

    Source: FedPipe, Fang et al. 2024, which scores weights by the singular values of their updates.
    Differs: its mixed-integer program also plans batch sizes and bits for each server; ranks of one budget need none.
    """
    for name, value, low in (("budget", budget, 1), ("least", least, 0), ("most", most, max(1, least))):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name} must be a whole number of at least {low}, got {value!r}.")
    if isinstance(model, MoAModel):
        raise ConfigError("ranks are allocated before there are mixtures: give the base.")
    sites = {site.name: site for site in find_sites(model, targets)}
    spectra = _spectra(model, data, sites, loss or _own_loss)
    gains = {name: values[:most].tolist() for name, values in spectra.items()}
    costs = {name: site.d_in + site.d_out for name, site in sites.items()}
    importance = {name: float(values.sum()) for name, values in spectra.items()}
    ranks = within_budget(gains, costs, budget, least)
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    return RankPlan({name: rank for name, rank in ranks.items() if rank}, importance, spent, budget)


def within_budget(
    gains: Mapping[str, list[float]], costs: Mapping[str, int], budget: int, least: int = 0
) -> dict[str, int]:
    """Return the rank of each layer, together within a budget; no tensors.

    Args:
        gains: of each unit of rank, falling.
        costs: of one.
        budget: that Σ rank · cost never passes.
        least: that every layer gets, as far as it has units.

    Raises:
        ConfigError: the budget does not pay for `least`.
    """
    ranks = {name: min(least, len(units)) for name, units in gains.items()}
    left = budget - sum(rank * costs[name] for name, rank in ranks.items())
    if left < 0:
        raise ConfigError(f"a budget of {budget} parameters is {-left} short of rank {least} in {len(ranks)} layers.")
    queue: list[tuple[float, int, int, str]] = []

    def offer(name: str, order: int) -> None:
        rank, units = ranks[name], gains[name]
        if rank < len(units) and units[rank] > 0:
            heapq.heappush(queue, (-units[rank] / costs[name], rank, order, name))

    for order, name in enumerate(gains):
        offer(name, order)
    while queue:
        _, _, order, name = heapq.heappop(queue)
        if costs[name] <= left:  # a narrower layer may still fit
            left -= costs[name]
            ranks[name] += 1
            offer(name, order)
    return ranks


def _spectra(
    model: nn.Module, data: Iterable[Mapping[str, Any]], sites: Mapping[str, Site], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Return the squared singular values of each layer's gradient, (min(i, o),), falling."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        raise ConfigError("the model is on the meta device and has no gradients: load its weights first.")
    found = weight_gradients(model, {name: site.module for name, site in sites.items()}, data, loss)
    return {name: torch.linalg.svdvals(found[name].to(device)).square() for name in sites}


def _own_loss(outputs: Any) -> Tensor:
    found = getattr(outputs, "loss", None)
    if not isinstance(found, Tensor):
        raise ConfigError(f"{type(outputs).__name__} has no loss: put labels into the data, or give loss=….")
    return found
