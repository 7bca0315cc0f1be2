"""Where experts start, read off data before training: the first update of their weight, or their layer's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..delta import Delta
from ..errors import ConfigError, NumericsError
from ..mixture import BlockMixture, Branch, Mixture
from ..model.outputs import loss_of
from ..model.watched import Batches, check_reached, rows_of, watched, weight_gradients
from ..objective.exchange import over_processes
from .principal import Principal
from .start_options import METHODS, check_start

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

LR = 1e-5  # LoRA-SB's 1e-4 over the 2 % of some 500 steps in which its schedule warms up


def initialize(
    model: MoAModel,
    data: Batches,
    method: str = "lora-sb",
    *,
    batches: int = 8,
    lr: float | None = None,
) -> dict[str, float]:
    """Start the experts of a fresh mixture where some batches of its data say; nothing else changes.

    The base runs without its experts, in evaluation mode. What several processes see is added up, so that all start
    alike; each needs a batch, or the others wait for it.

    - "lora-sb", for `expert="core"` with `save_bases=True`: bases B, A and core R are the r largest singular triplets
      of the first step of sign descent, -lr · sign Σ ∂loss/∂W, and all experts of a layer start there. The device
      holds one layer's gradient at a time; their sums, as large as the adapted weights, are on the host.
    - "eva", for `expert="lora"`: down starts at the principal components of the layer's inputs, the largest first,
      dealt to the experts in turn; up stays zero, and so does the mixture.

    Args:
        model: fresh from `moa.build`; changed in place.
        data: batches of its inputs on its device, input_ids (B, S) and so on, with labels for "lora-sb".
        method: "lora-sb" or "eva".
        batches: how many of them are looked at.
        lr: of the step, for "lora-sb" only; default 1e-5.

    Returns:
        Layer -> share, from 0 to 1, that its start holds of what it was taken from: ‖update‖², or the inputs' variance.

    Raises:
        ConfigError: an unknown method, experts that do not start so or that moved already, inputs that span fewer than
            E · r directions, a layer that the data does not reach, no data, or no loss. Nothing is changed.
        NumericsError: gradients or inputs that are not finite. Nothing is changed.
    Source: LoRA-SB, arXiv 2411.19557, §3.1 and algorithm 1; EVA, arXiv 2410.07170, §3.
    Differs: LoRA-SB's code rounds the bases to bf16; here they are orthonormal in the precision of the base's weight.
        EVA's rows are less their mean, as in its code and in peft. It gives ranks out over all layers by the variance
        that they hold; here a layer keeps its rank, and E experts share its E · r first components, of which EVA, with
        one expert, has r.
    """
    check_start(method, batches, lr)
    layers = fresh_layers(model, method)
    sample = itertools.islice(data, batches)
    if method == "eva":
        starts = _principal_inputs(model, layers, sample)
        for name, (directions, _) in starts.items():
            _bank(layers[name]).begin_at(method, directions)
        return {name: share for name, (_, share) in starts.items()}
    updates = _first_updates(model, layers, sample, LR if lr is None else lr)
    for name, update in updates.items():
        _bank(layers[name]).begin_at(method, update)
    return {name: _held(_bank(layers[name]).delta(0), update) for name, update in updates.items()}


def _held(change: Delta, whole: Tensor) -> float:
    """Return the share of ‖whole‖² that its nearest change (o, i) of a lower rank has."""
    return float(change.dense().double().square().sum() / whole.double().square().sum())


def _bank(mixture: Mixture) -> Any:
    branch = mixture.branches[0]
    assert isinstance(branch, Branch)
    return branch.bank


def _moves(change: Delta) -> bool:
    """Whether a change (o, i) is not 0; a factor of zeros says so without the product."""
    return bool(change.stored.any()) and bool(change.dense().any())


def fresh_layers(model: MoAModel, method: str) -> dict[str, Mixture]:
    """Return the mixtures (i -> o) by name, whose experts may start so and have not moved.

    Raises:
        ConfigError: experts that do not start so, or that moved already.
    """
    layers = model.mixtures()
    if not layers:
        raise ConfigError("this model has no mixtures to initialize.")
    for name, mixture in layers.items():
        bank = _bank(mixture)
        several = len(mixture.branches) > 1 or isinstance(mixture, BlockMixture) or mixture.branches[0].tap != "input"
        if several or method not in bank.starts:
            raise ConfigError(
                f"{name}: {type(bank).__name__} experts do not start by {method!r}, which is for {METHODS[method]}, "
                "one mixture on the input of a layer."
            )
        if any(_moves(bank.delta(expert)) for expert in range(bank.n_experts)):
            raise ConfigError(f"{name}: its experts have moved already: initialize a fresh mixture.")
    return layers


@contextmanager
def _base_alone(model: MoAModel) -> Iterator[None]:
    """Run the base without its experts inside the block, in evaluation mode."""
    was = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with model.disable_adapter():
            yield
    finally:
        for module, mode in was:
            module.training = mode


def _loss(outputs: Any) -> Tensor:
    found = loss_of(outputs)
    if found is None:
        raise ConfigError("'lora-sb' needs a loss, and the model gave none: put labels into the batches.")
    return found


def _first_updates(model: MoAModel, layers: Mapping[str, Mixture], data: Batches, lr: float) -> dict[str, Tensor]:
    """Return by layer -lr · sign Σ ∂loss/∂W (o, i)."""
    with _base_alone(model):
        found = weight_gradients(model, _bases(layers), data, _loss)
    updates = {}
    for name in layers:
        (total,) = over_processes([found.pop(name).to(_bank(layers[name]).core.device)])
        if not total.any():
            raise ConfigError(f"{name}: the gradient of its weight is 0 on these batches, which gives no direction.")
        updates[name] = -lr * total.sign()
    return updates


def _bases(layers: Mapping[str, Mixture]) -> dict[str, nn.Module]:
    return {name: mixture.base for name, mixture in layers.items()}


def _principal_inputs(model: MoAModel, layers: Mapping[str, Mixture], data: Batches) -> dict[str, tuple[Tensor, float]]:
    """Return by layer the E · r first principal components of its inputs (E · r, i), and the share along them."""
    wanted = {name: _bank(mixture).n_experts * _bank(mixture).rank for name, mixture in layers.items()}
    found: dict[str, Principal] = {}

    def watch(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        rows = rows_of(module, x)
        mask = layers[name].context.mask_for(rows)
        rows = rows.flatten(0, -2) if mask is None else rows[mask]  # (T, i)
        if not rows.isfinite().all():
            raise NumericsError(f"{name}: its inputs are not finite on these batches.")
        found.setdefault(name, Principal(2 * wanted[name] + 16)).add(rows)

    n_batches = 0
    with _base_alone(model), watched(_bases(layers), watch), torch.no_grad():
        for batch in data:
            model(**batch)
            n_batches += 1
    check_reached(layers, found, n_batches)
    starts = {}
    for name, n in wanted.items():
        found[name].over_processes()
        vectors, share = found[name].directions(n)
        if len(vectors) < n:
            raise ConfigError(
                f"{name}: the inputs of {n_batches} batches span {len(vectors)} directions, and its experts need {n}: "
                "look at more batches, or take fewer experts or a lower rank."
            )
        starts[name] = (vectors, share)
    return starts
