"""PEFT LoRA adapters made the experts of a mixture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..delta import Delta, Dense, LowRank
from ..errors import CheckpointError, ConfigError
from ..mixture import Branch, ExpertsMixture, Mixture
from .foreign import Foreign, read_foreign
from .named_deltas import Deltas, check_finite, deltas
from .peft_folder import Lora
from .peft_parameters import matrices_of, unstacked
from .peft_start import Base, base_of_model

LOW_RANK = "an expert is a low-rank change of linear layers; moa.merge.read_peft with base= reads it for merging"


def read_adapters(paths: Sequence[str | Path], model: nn.Module) -> list[Deltas]:
    """Return the adapters in PEFT LoRA folders as changes of a model's layers.

    Args:
        paths: folders, one per expert.
        model: the base, whose weights (o, i) tell what PiSSA, OLoRA and KaSA mean.

    Returns:
        One set per folder: layer name -> low-rank change (o, i), its scale included.

    Raises:
        ConfigError: no path given.
        CheckpointError: a folder that is not a PEFT LoRA adapter, or whose change is not low-rank; the option is named.
        NumericsError: NaN or infinity in a factor.
    """
    if not paths:
        raise ConfigError("experts=[] names no adapter folder.")
    base = base_of_model(model)
    return [expert_changes(unstacked(read_foreign(Path(path)), model), base) for path in paths]


def expert_changes(found: Foreign, base: Base | None) -> Deltas:
    """Return a folder's adapter as layer name -> low-rank change (o, i): see `read_adapters`.

    Raises:
        CheckpointError: an adapter whose change is not low-rank.
        NumericsError: NaN or infinity in a factor.
    """
    source = str(found.path)
    lora = Lora(found.tensors, found.config, source, base)
    if lora.whole:
        name, key = next(iter(lora.whole.items()))
        said = [f"{o}={found.config[o]!r}" for o in ("modules_to_save", "bias") if found.config.get(o)]
        raise CheckpointError(
            f"{source} holds {key!r}, trained whole ({', '.join(said)}), and the base's {name!r} differs: {LOW_RANK}."
        )
    if found.config.get("lora_bias"):
        raise CheckpointError(f"{source} sets lora_bias=True, which trains a bias behind the factors: {LOW_RANK}.")
    changes: dict[str, Delta] = {}
    for name in lora.parts:
        delta = lora.delta(name)
        if not isinstance(delta, LowRank):
            raise CheckpointError(f"{source} sets use_dora=True, whose change of {name!r} is dense: {LOW_RANK}.")
        changes[name] = check_finite(delta, name, source)
    return deltas(changes, source)


def names_of(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Return the last part of each folder's path, or () where they do not name; no tensors, so no shapes.

    Two that are the same would not tell the experts apart, and a number would be taken for an expert's number.
    """
    names = tuple(os.path.basename(os.path.abspath(path)) for path in paths)
    return names if len(set(names)) == len(names) and not any(n.isdecimal() or not n for n in names) else ()


def largest_rank(adapters: Sequence[Deltas]) -> int:
    """Return the largest rank over adapters and their layers, down (r, i)."""
    return max(delta.rank for adapter in adapters for delta in adapter.values() if isinstance(delta, LowRank))


@torch.no_grad()
def load_experts(
    mixtures: Mapping[str, Mixture], names: Sequence[str], adapters: Sequence[Deltas], first: int = 0
) -> None:
    """Make adapter e expert e of the named mixtures; a layer it does not adapt keeps a zero expert.

    Each adapter's own scale goes into its up factor, so that experts of unequal rank and alpha share one bank scale.

    Args:
        mixtures: name -> mixture, with banks of down (E, r, i) and up (E, r, o).
        names: the layers to fill.
        adapters: E of them, layer name -> low-rank change (o, i).
        first: number of the first expert to fill; those before it stay as they are.

    Raises:
        ConfigError: a recipe whose experts are not LoRAs, or not as many as there are adapters.
        CheckpointError: a factor of another shape than its layer: an adapter for another base.
    """
    for name in names:
        mixture = mixtures[name]
        if isinstance(mixture, ExpertsMixture):
            _load_matrices(mixture, adapters, first)
            continue
        branch = mixture.branches[0]
        assert isinstance(branch, Branch)
        bank = branch.bank
        if bank.mixes != "outputs" or bank.factors() is None:
            raise ConfigError(
                f"experts=[…] are LoRA adapters whose outputs are mixed, this recipe's experts are "
                f"{type(bank).__name__}: choose another, e.g. 'topk', 'dense', 'remix', 'xlora' or 'arrow'."
            )
        if bank.n_experts != first + len(adapters):
            raise ConfigError(
                f"{name} has {bank.n_experts} expert(s) in this recipe, and {len(adapters)} adapters were given: give "
                "adapters of the layers that it routes alone, or choose another, e.g. 'topk', 'dense' or 'xlora'."
            )
        nothing = Dense(torch.zeros(bank.d_out, bank.d_in)).zeros()
        for e, adapter in enumerate(adapters, first):
            delta = adapter.get(name, nothing)
            if delta.shape != (bank.d_out, bank.d_in):
                raise CheckpointError(
                    f"{adapter.source}: the change of {name} is {tuple(delta.shape)}, the layer is {bank.d_in} -> "
                    f"{bank.d_out}: this adapter was made for another base."
                )
            bank.read(e, delta)


def _load_matrices(mixture: ExpertsMixture, adapters: Sequence[Deltas], first: int) -> None:
    """Make adapter e expert e on each matrix (o, i) of fused experts."""
    branches: list[Branch] = list(mixture.branches)  # type: ignore[arg-type]
    n_experts = branches[0].router.n_experts
    bank, fits = branches[0].bank, len(branches) == 2 and n_experts == first + len(adapters)
    if not fits or bank.mixes != "outputs" or bank.factors() is None:
        raise ConfigError(
            f"{mixture.name} has {n_experts} expert(s) of {type(bank).__name__} in this recipe, and "
            f"{len(adapters)} adapters were given: choose another, e.g. 'topk', 'dense' or 'remix'."
        )
    for branch in branches:
        for parameter in branch.bank.parameters():
            parameter.view(-1, n_experts, *parameter.shape[1:])[:, first:] = 0  # what an adapter does not change
    for e, adapter in enumerate(adapters, first):
        for name, (half, n) in matrices_of(mixture, adapter).items():
            branches[half].bank.read(n * n_experts + e, adapter[name])
