"""What every start from data needs: mixtures that have not moved, their base by itself, the rows that it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..delta import Delta
from ..errors import ConfigError, NumericsError
from ..mixture import BlockMixture, Branch, Mixture
from ..model.watched import Batches, check_reached, in_evaluation, rows_of, watched
from .start_options import METHODS

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel


def bank_of(mixture: Mixture) -> Any:
    """Return the one bank of a mixture, (*rows, i) -> (*rows, o)."""
    branch = mixture.branches[0]
    assert isinstance(branch, Branch)
    return branch.bank


def bases_of(layers: Mapping[str, Mixture]) -> dict[str, nn.Module]:
    """Return the adapted layers (i -> o) by name."""
    return {name: mixture.base for name, mixture in layers.items()}


def _moves(change: Delta) -> bool:
    """Whether a change (o, i) is not 0; a factor of zeros says so without the product."""
    return bool(change.stored.any()) and bool(change.dense().any())


def fresh_layers(model: MoAModel, method: str) -> dict[str, Mixture]:
    """Return the mixtures (i -> o) by name, whose experts may start so and have not moved.

    Raises:
        ConfigError: experts that do not start so, that moved already, or that have no values.
    """
    layers = model.mixtures()
    if not layers:
        raise ConfigError("this model has no mixtures to initialize.")
    for name, mixture in layers.items():
        bank = bank_of(mixture)
        several = len(mixture.branches) > 1 or isinstance(mixture, BlockMixture) or mixture.branches[0].tap != "input"
        if several or method not in bank.starts:
            raise ConfigError(
                f"{name}: {type(bank).__name__} experts do not start by {method!r}, which is for {METHODS[method]}, "
                "one mixture on the input of a layer."
            )
        if any(parameter.is_meta for parameter in bank.parameters()):
            raise ConfigError(f"{name}: its experts are on the meta device and have no values: load the model first.")
        if any(_moves(bank.delta(expert)) for expert in range(bank.n_experts)):
            raise ConfigError(f"{name}: its experts have moved already: initialize a fresh mixture.")
    return layers


@contextmanager
def base_alone(model: MoAModel) -> Iterator[None]:
    """Run the base without its experts inside the block, in evaluation mode."""
    with in_evaluation(model), model.disable_adapter():
        yield


def watch_inputs(
    model: MoAModel, layers: Mapping[str, Mixture], data: Batches, add: Callable[[str, Tensor], None]
) -> int:
    """Run the base on batches, show `add` the rows that each layer sees, and return the number of batches.

    Args:
        model: with the layers.
        layers: by name.
        data: keywords of the model.
        add: called with a layer's name and rows (T, i), those of padding left out.

    Raises:
        ConfigError: no data, or a layer that it does not reach.
        NumericsError: inputs that are not finite, by layer.
    """
    seen: dict[str, bool] = {}

    def watch(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        rows = rows_of(module, x)
        mask = layers[name].context.mask_for(rows)
        rows = rows.flatten(0, -2) if mask is None else rows[mask]  # (T, i)
        if not rows.isfinite().all():
            raise NumericsError(f"{name}: its inputs are not finite on these batches.")
        seen[name] = True
        add(name, rows)

    n_batches = 0
    with base_alone(model), watched(bases_of(layers), watch), torch.no_grad():
        for batch in data:
            model(**batch)
            n_batches += 1
    check_reached(layers, seen, n_batches)
    return n_batches
