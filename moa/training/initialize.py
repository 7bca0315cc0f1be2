"""Where experts start, read off data before training: the first update of their weight, or their layer's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, NumericsError
from ..layers import is_convolution, patches
from ..mixture import BlockMixture, Branch, Mixture
from ..model.outputs import loss_of
from ..objective.exchange import over_processes
from .principal import Principal
from .start_options import METHODS, check_start
from .watching import base_watched, rows_in, rows_out

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

LR = 1e-5  # LoRA-SB's 1e-4 over the 2 % of some 500 steps in which its schedule warms up
Batches = Iterable[Mapping[str, Any]]


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
    alike.

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
    else:
        starts = _first_updates(model, layers, sample, LR if lr is None else lr)
    for name, (start, _) in starts.items():
        _bank(layers[name]).begin_at(method, start)
    return {name: share for name, (_, share) in starts.items()}


def _bank(mixture: Mixture) -> Any:
    branch = mixture.branches[0]
    assert isinstance(branch, Branch)
    return branch.bank


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
        if any(bool(bank.delta(expert).dense().any()) for expert in range(bank.n_experts)):
            raise ConfigError(f"{name}: its experts have moved already: initialize a fresh mixture.")
    return layers


def _check_reached(layers: Mapping[str, Mixture], found: Mapping[str, Any], n_batches: int) -> None:
    if not n_batches:
        raise ConfigError("data holds no batch.")
    missing = [name for name in layers if name not in found]
    if missing:
        raise ConfigError(
            f"{len(missing)} of {len(layers)} layers, e.g. {missing[0]}, were not reached by the {n_batches} batches: "
            "leave them out with exclude=, or give data that goes through them."
        )


def _first_updates(
    model: MoAModel, layers: Mapping[str, Mixture], data: Batches, lr: float
) -> dict[str, tuple[Tensor, float]]:
    """Return by layer -lr · sign Σ ∂loss/∂W (o, i), and how much of it the r largest singular values hold."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor, y: Tensor) -> Tensor:
        leaf = y if y.requires_grad else y.detach().requires_grad_()  # all before it is frozen
        mixture, x = layers[name], x.detach()
        rows = patches(mixture.base, x).flatten(0, -2) if is_convolution(mixture.base) else x.flatten(0, -2)

        def add(gradient: Tensor) -> None:
            g = rows_out(mixture, gradient)
            wide = torch.promote_types(g.dtype, torch.float32)
            product = (g.to(wide).mT @ rows.to(wide)).cpu()  # (o, i)
            sums[name] = product if name not in sums else sums[name].add_(product)

        leaf.register_hook(add)
        return leaf.clone()  # what follows may write into it

    n_batches = 0
    with base_watched(model, layers, watch), torch.enable_grad():
        for batch in data:
            loss = loss_of(model(**batch))
            if loss is None:
                raise ConfigError(f"'lora-sb' needs a loss, and none came for {', '.join(batch)}: add labels.")
            loss.backward()  # type: ignore[no-untyped-call]
            n_batches += 1
    _check_reached(layers, sums, n_batches)
    return {name: _sign_step(name, sums.pop(name), _bank(layer), lr) for name, layer in layers.items()}


def _sign_step(name: str, gradient: Tensor, bank: Any, lr: float) -> tuple[Tensor, float]:
    (total,) = over_processes([gradient.to(bank.core.device)])
    if not total.isfinite().all():
        raise NumericsError(f"{name}: the gradient of its weight is not finite on these batches.")
    if not total.any():
        raise ConfigError(f"{name}: the gradient of its weight is 0 on these batches, which gives no direction.")
    update = -lr * total.sign()  # (o, i)
    values = torch.linalg.svdvals(update)
    return update, float((values[: bank.rank] ** 2).sum() / (values**2).sum())


def _principal_inputs(model: MoAModel, layers: Mapping[str, Mixture], data: Batches) -> dict[str, tuple[Tensor, float]]:
    """Return by layer the E · r first principal components of its inputs (E · r, i), and the share along them."""
    wanted = {name: _bank(mixture).n_experts * _bank(mixture).rank for name, mixture in layers.items()}
    found: dict[str, Principal] = {}

    def watch(name: str, x: Tensor, y: Tensor) -> None:
        rows = rows_in(layers[name], x)
        if not rows.isfinite().all():
            raise NumericsError(f"{name}: its inputs are not finite on these batches.")
        found.setdefault(name, Principal(2 * wanted[name] + 16)).add(rows)

    n_batches = 0
    with base_watched(model, layers, watch), torch.no_grad():
        for batch in data:
            model(**batch)
            n_batches += 1
    _check_reached(layers, found, n_batches)
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
