"""The one weight change that a layer's branches stand for, whoever asks: folding, averaging, exporting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta, total
from ..errors import ConfigError, FoldError
from ..experts import ExpertBank
from ..layers import matrix
from .mixture import Branch, Mixture

Change = tuple[Delta, Tensor | None]


@torch.no_grad()
def layer_change(mixture: Mixture, of: Callable[[Branch], Change]) -> Change:
    """Return the changes of weight (o, i) and bias (o,) or None that a mixture equals, given those of its branches.

    With y0 = W x + b, branches on the input D x + c and branches on the output S y0 + t:
    y = (W + D + S W) x + b + c + S b + t

    Args:
        mixture: whose base is a linear layer or a convolution, then (o, C · kernel).
        of: branch -> the change that its bank stands for; see `mixed` and `single`.

    Raises:
        FoldError: the experts are not a weight change, or a branch on the output goes through a base that holds no
            dense weight; the layer is named.
    """
    changes: list[Delta] = []
    shifts: list[Tensor] = []
    base: Any = mixture.base
    for branch in mixture.branches:
        assert isinstance(branch, Branch)
        try:
            change, constant = of(branch)
        except FoldError as error:
            raise FoldError(f"{mixture.name}: {error}") from error
        if constant is not None:
            shifts.append(constant)
        if branch.tap == "output":
            dense, bias = matrix(base), getattr(base, "bias", None)
            if dense is None:
                raise FoldError(f"{mixture.name}: a {type(base).__name__} holds no dense weight to go through.")
            if bias is not None:
                shifts.append(change.before(bias.unsqueeze(1)).dense().squeeze(1))
            change = change.before(dense)
        changes.append(change)
    if not changes:
        raise FoldError(f"{mixture.name} has no branch to fold.")
    return total(changes), torch.stack([s.to(shifts[0].dtype) for s in shifts]).sum(0) if shifts else None


def mixed(bank: ExpertBank, weights: Tensor) -> Change:
    """Return the change (o, i) and the constant (o,) of a bank whose experts have the same weights on every row.

    Args:
        bank: E experts.
        weights: (E,) or (H, E).
    """
    constants = bank.constants()  # (E, o)
    return bank.mixed_delta(weights), None if constants is None else weights.to(constants.dtype) @ constants


def single(bank: ExpertBank, expert: int) -> Change:
    """Return the change (o, i) and the constant (o,) of one expert: a layer that has one keeps it for every number.

    Raises:
        ConfigError: no such expert.
    """
    own = number_in(bank, expert)
    constants = bank.constants()  # (E, o)
    return bank.delta(own), None if constants is None else constants[own]


def number_in(bank: ExpertBank, expert: int) -> int:
    """Return which expert of a bank (E, …) an expert of the whole model is: its only one for every number.

    Raises:
        ConfigError: no such expert.
    """
    if bank.n_experts == 1 and expert > 0:
        return 0
    if not 0 <= expert < bank.n_experts:
        raise ConfigError(f"expert {expert} does not exist: this layer has experts 0 to {bank.n_experts - 1}.")
    return expert


def check_expert(expert: int, counts: Iterable[int]) -> None:
    """Check that a model has an expert of a number; no tensors, so no shapes.

    Args:
        expert: its number.
        counts: experts of each recipe.

    Raises:
        ConfigError: none of the recipes has as many.
    """
    most = max(counts, default=0)
    if most and not 0 <= expert < most:
        raise ConfigError(f"expert {expert} does not exist: this model has experts 0 to {most - 1}.")


def factor_change(mixture: Mixture, of: Callable[[Branch], Change]) -> Delta:
    """Return the change of weight (o, i) that a mixture equals, where it is nothing else.

    Args:
        mixture, of: as in `layer_change`.

    Raises:
        FoldError: as there, or the branches add a constant, which a LoRA has no place for, or change several matrices.
    """
    parts = mixture.slices()
    if len(parts) > 1:
        raise FoldError(
            f"{mixture.name}: a {type(mixture.base).__name__} holds {len(parts)} tensors of "
            f"{len(parts[0].layers)} matrices, whose changes are not one."
        )
    change, shift = layer_change(mixture, of)
    if shift is not None and bool(shift.any()):
        raise FoldError(
            f"{mixture.name}: its branches add a constant to every row, which a LoRA has no place for: fold the "
            "mixture into the base where its routing is constant."
        )
    return change
