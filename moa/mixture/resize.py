"""The same layer with one expert more or less: what it learned is moved into one that was built for the new number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..layers import Site, features
from .experts_mixture import ExpertsMixture
from .mixture import Branch, Mixture

Order = Sequence[int | None]


def site_of(mixture: Mixture) -> Site:
    """Return the site, (*rows, i) -> (*rows, o), on which a mixture was built."""
    if isinstance(mixture, ExpertsMixture):
        layout, base = mixture.layout, mixture.base
        size = layout.size(base, layout.up)[1], layout.size(base, layout.down)[2]
    else:
        bank = _branches(mixture)[0].bank
        size = features(mixture.base) or (bank.d_in, bank.d_out)
    return Site(mixture.name, mixture.base, *size)


def why_fixed(mixture: Mixture) -> str | None:
    """Return why no expert of a layer, (*rows, i) -> (*rows, o), can be added or removed, or None."""
    for branch in _branches(mixture):
        for part in (branch.router, branch.bank):
            if part.fixed_size is not None:
                kind = type(part).__name__
                return f"{mixture.name}: {kind} has as many experts as it was built for: {part.fixed_size}"
    return None


@torch.no_grad()
def move_experts(old: Mixture, new: Mixture, order: Order) -> None:
    """Copy what a layer has learned into one with other experts, both (*rows, i) -> (*rows, o).

    Args:
        old: keeps what it has.
        new: of the same recipe, as it is built.
        order: for each expert of a new bank, its number in the old one; None leaves it as it is built.

    Raises:
        ConfigError: a tensor changes its size, and nobody says which axis the experts are on; or experts drawn from a
            seed by their number would have another number.
    """
    for mine, theirs in zip(_branches(old), _branches(new), strict=True):
        if mine.bank.n_experts == theirs.bank.n_experts:  # of a layer that carries only one, whatever E is
            moved: Order = range(mine.router.n_experts)
        else:
            moved = order
        banks = dict.fromkeys(mine.bank.per_expert, 0)
        _move(old.name, mine.bank, theirs.bank, banks, (), moved, mine.router.n_experts, by_matrix=True)
        names, anew = mine.router.per_expert, mine.router.made_anew
        _move(old.name, mine.router, theirs.router, names, anew, moved, mine.router.n_experts, by_matrix=False)


def move_shared(old: nn.Module, new: nn.Module, order: Order, n_experts: int) -> nn.Module:
    """Return what the routers of all layers share, (*rows, d) -> (*rows, E), made for another number of experts.

    Args:
        old: keeps what it has; its `per_expert` names the tensors with an axis of experts.
        new: as it is built; it gets what the old one has learned.
        order: for each expert of the new one, its number in the old one; None leaves it as it is built.
        n_experts: E of the old one.
    """
    names: Any = getattr(old, "per_expert", {})
    with torch.no_grad():
        _move("what all layers share", old, new, names, (), order, n_experts, by_matrix=False)
    return new.train(old.training)


def become(old: Mixture, new: Mixture) -> None:
    """Make a layer, (*rows, i) -> (*rows, o), what another one is; its modules stay the ones that others know."""
    for mine, theirs in zip(_branches(old), _branches(new), strict=True):
        for own, other in ((mine.router, theirs.router), (mine.bank, theirs.bank)):
            vars(own).update({name: value for name, value in vars(other).items() if "hook" not in name})


def _branches(mixture: Mixture) -> list[Branch]:
    return list(mixture.branches)  # type: ignore[arg-type]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


def _move(
    layer: str,
    old: nn.Module,
    new: nn.Module,
    per_expert: Mapping[str, int],
    made_anew: Sequence[str],
    order: Order,
    n_experts: int,
    *,
    by_matrix: bool,
) -> None:
    targets, drawn = dict(_tensors(new)), _seeded(new)
    kept = [(place, number) for place, number in enumerate(order) if number is not None]
    for name, value in _tensors(old):
        target = targets[name]
        target.data = target.data.to(value.device, value.dtype)
        if isinstance(target, nn.Parameter):
            target.requires_grad_(value.requires_grad)
        if name in made_anew:
            continue
        if name not in per_expert:
            if target.shape != value.shape:
                raise ConfigError(
                    f"{layer}: {name} of {type(old).__name__} becomes {tuple(target.shape)} from {tuple(value.shape)}, "
                    "and per_expert does not say which axis the experts are on: no expert can be added or removed."
                )
            target.copy_(value)
            continue
        axis = per_expert[name]
        times = value.shape[axis] // n_experts  # of slots an expert has, or of matrices that each have E experts
        pairs = itertools.product(range(times), kept) if by_matrix else ((t, k) for k in kept for t in range(times))
        places, numbers = [], []
        for t, (place, number) in pairs:
            places.append(t * len(order) + place if by_matrix else place * times + t)
            numbers.append(t * n_experts + number if by_matrix else number * times + t)
        chosen = value.index_select(axis, torch.tensor(numbers, device=value.device))
        where = torch.tensor(places, device=value.device)
        if name in drawn and not torch.equal(target.index_select(axis, where), chosen):
            raise ConfigError(
                f"{layer}: {name} of {type(old).__name__} is not saved: it is drawn again for the number of experts "
                "that there are, and comes out otherwise. Of experts drawn one after the other the last can be removed."
            )
        target.index_copy_(axis, where, chosen)


def _seeded(module: nn.Module) -> set[str]:
    """Return the names of what is drawn again when a bank (*rows, i) -> (*rows, o) is loaded."""
    if not hasattr(module, "scaling"):  # a router's are what it counts
        return set()
    found = set()
    for path, inner in module.named_modules():
        found |= {f"{path}.{name}" if path else name for name in inner._non_persistent_buffers_set}
    return found
