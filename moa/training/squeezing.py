"""LoRA-Squeeze in training: experts begin at a high rank, which is lowered in stages to that of the checkpoint.

The squeeze is `moa.merge.squeeze`: QR of both factors, SVD of what is r x r; nothing of a weight's size is formed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..delta import LowRank
from ..errors import ConfigError
from ..experts.lora import LoRABank
from ..formats.sharded import is_sharded
from ..merge import squeeze
from ..merge.compose import thin_svd
from ..model.host import Host
from ..recipes import Recipe
from ..spectrum import rank_for_energy
from .factor_pairs import factored_banks, layer_of

MOST = 2**20  # ranks


def squeeze_experts(
    model: Host,
    rank: int | None = None,
    *,
    energy: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, list[float]]:
    """Lower the rank of a model's low-rank experts in place, and return layer -> ‖ΔW_e - what is left of it‖_F of each.

    Every expert becomes the nearest change of the rank, up √(Σ / s) and √(Σ / s) down, at the scale s that it had:
    the recipe's alpha is baked anew where s follows from it. Rows beyond an expert's own rank keep what down had,
    behind a zero up, so that steps can use them. Routers keep their bits. Parameters stay the same objects, so that an
    optimizer goes on; what it keeps of the factors belonged to other axes and is dropped, all else kept.

    Args:
        model: with experts of factors (E, r, i), (E, r, o).
        rank: k; a recipe of rank k or lower stays as it is.
        energy: instead, each recipe gets the smallest rank at which every expert keeps this share of ‖ΔW_e‖², (0, 1].
        optimizer: that trains them.

    Raises:
        ConfigError: neither or both of rank and energy, one out of range, experts without two trained factors of their
            own, or factors that are sharded; inside `folded`.

    Source: LoRA-Squeeze, its post-hoc form; Eckart and Young 1936.
    Differs: s stays, so that a learning rate means what it meant; the paper's new factors have s = 1.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"squeeze_experts: give rank or energy, one of them; got rank={rank} and energy={energy}.")
    if rank is not None and rank < 1:
        raise ConfigError(f"squeeze_experts: rank is {rank}, expected at least 1.")
    model._check_not_folded("squeezing")
    banks = _banks(model)
    targets = {}
    for number, (recipe, names) in enumerate(model.recipes):
        wanted = rank or max(_energetic(bank, energy or 0) for key, bank in banks.items() if layer_of(key) in names)
        if wanted < recipe.largest_rank:
            targets[number] = wanted
    errors = {name: [0.0] * bank.n_experts for name, bank in banks.items()}
    with model.scope.turns.alone(), torch.no_grad():
        for number, bank, name in _of_recipes(model, banks, targets):
            found = [squeeze(bank.delta(e), targets[number]) for e in range(bank.n_experts)]
            errors[name] = [one.error for one in found]
            down, up = _factors([one.delta for one in found], bank, targets[number])
            _become(bank, down, up)
            for parameter in (bank.down, bank.up):
                if optimizer is not None:
                    optimizer.state.pop(parameter, None)
        _note(model, banks, targets)
    model.experts_changed()
    return errors


def current_rank(model: Host) -> int:
    """Return the largest rank that a model's experts have now; no tensors are read."""
    return max(recipe.largest_rank for recipe, _ in model.recipes)


def check_stages(ranks: Sequence[int], every: int) -> None:
    """Check the ranks of stages, and the optimizer steps before each; no tensors, so no shapes.

    Raises:
        ConfigError: no ranks, ranks that do not fall or are below 1, or no steps.
    """
    wrong = isinstance(ranks, str) or any(isinstance(r, bool) or not isinstance(r, int) for r in ranks)
    if wrong or not ranks or min(ranks) < 1 or max(ranks) > MOST or list(ranks) != sorted({*ranks}, reverse=True):
        raise ConfigError(
            f"ranks must fall from stage to stage to the last, the checkpoint's, e.g. [16, 8], got {ranks!r}."
        )
    if every < 1:
        raise ConfigError(f"every must be at least 1 optimizer step, got {every}.")


def check_begins_above(model: Host, ranks: Sequence[int]) -> None:
    """Refuse experts, (E, r, i), that do not begin above the first of falling ranks.

    Raises:
        ConfigError: they do not, or are not factors that are trained; the rank or the layer is named.
    """
    _banks(model)
    for recipe, _ in model.recipes:
        if recipe.largest_rank <= ranks[0]:
            raise ConfigError(
                f"the experts have rank {recipe.largest_rank}, and ranks={list(ranks)} are to come after it: build "
                f"with a rank above {ranks[0]}."
            )


def take_ranks(model: Host, tensors: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Give a model's experts, (E, r, i) and (E, r, o), the ranks of those in a state dict that is about to be loaded.

    It is a hook for `register_load_state_dict_pre_hook`.
    """
    banks = _banks(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    targets = {}
    for number, (recipe, layers) in enumerate(model.recipes):
        stored = tensors.get(prefix + names[id(banks[layers[0]].down)])
        if stored is not None and stored.ndim == 3 and stored.shape[1] != recipe.largest_rank:
            targets[number] = int(stored.shape[1])
    for number, bank, _name in _of_recipes(model, banks, targets):
        sizes = [(p.shape[0], targets[number], p.shape[2]) for p in (bank.down, bank.up)]
        _become(bank, *(bank.down.new_zeros(size) for size in sizes))
    _note(model, banks, targets)


def _banks(model: Host) -> dict[str, LoRABank]:
    banks = factored_banks(model, "LoRA-Squeeze shortens")
    if any(is_sharded(parameter) for bank in banks.values() for parameter in bank.parameters()):
        raise ConfigError("LoRA-Squeeze needs whole factors, and these are sharded: leave out fsdp and deepspeed.")
    return banks


def _of_recipes(
    model: Host, banks: Mapping[str, LoRABank], targets: Mapping[int, int]
) -> Iterator[tuple[int, LoRABank, str]]:
    for number in targets:
        names = set(model.recipes[number][1])
        yield from ((number, bank, key) for key, bank in banks.items() if layer_of(key) in names)


def _energetic(bank: LoRABank, energy: float) -> int:
    return max(1, *(rank_for_energy(thin_svd(bank.delta(e))[1], energy) for e in range(bank.n_experts)))


def _factors(changes: Sequence[LowRank], bank: LoRABank, rank: int) -> tuple[Tensor, Tensor]:
    """Return down (E, k, i) and up (E, k, o) of changes whose factors are √Σ each."""
    root = bank.scaling**0.5
    down, up = bank.down[:, :rank].clone(), torch.zeros_like(bank.up[:, :rank])
    for expert, change in enumerate(changes):
        down[expert, : change.rank] = (change.down / root).to(down.dtype)
        up[expert, : change.rank] = (change.up.T / root).to(up.dtype)
    return down, up


def _become(bank: LoRABank, down: Tensor, up: Tensor) -> None:
    """Let a bank's own parameters hold down (E, k, i) and up (E, k, o)."""
    for parameter, values in ((bank.down, down), (bank.up, up)):
        parameter.grad = None  # of the old size
        parameter.data = values.contiguous()
    bank.rank = down.shape[1]


def _note(model: Host, banks: Mapping[str, LoRABank], targets: Mapping[int, int]) -> None:
    """Say in the recipes what rank and alpha the experts, (E, r, i), have now."""
    model.recipes = [
        (_at_rank(recipe, targets[number]) if number in targets else recipe, names)
        for number, (recipe, names) in enumerate(model.recipes)
    ]
    for number, bank, _name in _of_recipes(model, banks, targets):
        bank.scaling = model.recipes[number][0].scaling()  # to the bit what a checkpoint of it has


def _at_rank(recipe: Recipe, rank: int) -> Recipe:
    """Return a recipe of another rank and the same scale."""
    changed = dataclasses.replace(recipe, rank=rank)
    if changed.scaling() == recipe.scaling():
        return changed
    per_alpha = dataclasses.replace(changed, alpha=1.0).scaling()
    return dataclasses.replace(changed, alpha=recipe.scaling() / per_alpha)
