"""Where experts start, read off data before training: the first update of their weight, or their layer's inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..delta import Delta
from ..errors import ConfigError
from ..mixture import Mixture
from ..model.outputs import loss_of
from ..model.watched import Batches, weight_gradients
from ..objective.exchange import over_processes
from .fresh import bank_of, base_alone, bases_of, fresh_layers, watch_inputs
from .originals import Original
from .principal import Principal
from .restore import restore
from .start_options import check_start

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
    original: Original | None = None,
) -> dict[str, float]:
    """Start the experts of a fresh mixture where some batches of its data say; nothing else changes.

    The base runs without its experts, in evaluation mode. What several processes see is added up, so that all start
    alike; each needs a batch, or the others wait for it.

    - "lora-sb", for `expert="core"` with `save_bases=True`: bases B, A and core R are the r largest singular triplets
      of the first step of sign descent, -lr · sign Σ ∂loss/∂W, and all experts of a layer start there. The device
      holds one layer's gradient at a time; their sums, as large as the adapted weights, are on the host.
    - "eva", for `expert="lora"`: down starts at the principal components of the layer's inputs, the largest first,
      dealt to the experts in turn; up stays zero, and so does the mixture.
    - "qwha", for `expert="qwha"` with `mask="given"` over a quantised base: all experts of a layer start at the
      coefficients that restore what its outputs lost by quantising; `moa.training.restore` gives the errors, too.

    Args:
        model: fresh from `moa.build`; changed in place.
        data: batches of its inputs on its device, input_ids (B, S) and so on, with labels for "lora-sb".
        method: "lora-sb", "eva" or "qwha".
        batches: how many of them are looked at.
        lr: of the step, for "lora-sb" only; default 1e-5.
        original: for "qwha" only, the weights before they were quantised: that model, its tensors by name, or a folder
            or file of safetensors.

    Returns:
        Layer -> share, from 0 to 1, that its start holds of what it was taken from: ‖update‖², the inputs' variance, or
        ‖(W0 - W) X‖² of the original weight W0 and the quantised W.

    Raises:
        ConfigError: an unknown method, experts that do not start so or that moved already, inputs that span fewer than
            E · r directions, a layer that the data does not reach, no data, or no loss; no original weights, those
            of another model, or a base that lost nothing. Nothing is changed.
        NumericsError: gradients or inputs that are not finite. Nothing is changed.
    Source: LoRA-SB, arXiv 2411.19557, §3.1 and algorithm 1; EVA, arXiv 2410.07170, §3; QWHA, arXiv 2509.17428, §3.
    Differs: LoRA-SB's code rounds the bases to bf16; here they are orthonormal in the precision of the base's weight.
        EVA's rows are less their mean, as in its code and in peft. It gives ranks out over all layers by the variance
        that they hold; here a layer keeps its rank, and E experts share its E · r first components, of which EVA, with
        one expert, has r.
    """
    check_start(method, batches, lr, original)
    if original is not None:
        return {name: one.share for name, one in restore(model, data, original, batches=batches).items()}
    layers = fresh_layers(model, method)
    sample = itertools.islice(data, batches)
    if method == "eva":
        starts = _principal_inputs(model, layers, sample)
        for name, (directions, _) in starts.items():
            bank_of(layers[name]).begin_at(method, directions)
        return {name: share for name, (_, share) in starts.items()}
    updates = _first_updates(model, layers, sample, LR if lr is None else lr)
    for name, update in updates.items():
        bank_of(layers[name]).begin_at(method, update)
    return {name: _held(bank_of(layers[name]).delta(0), update) for name, update in updates.items()}


def _held(change: Delta, whole: Tensor) -> float:
    """Return the share of ‖whole‖² that its nearest change (o, i) of a lower rank has."""
    return float(change.dense().double().square().sum() / whole.double().square().sum())


def _loss(outputs: Any) -> Tensor:
    found = loss_of(outputs)
    if found is None:
        raise ConfigError("'lora-sb' needs a loss, and the model gave none: put labels into the batches.")
    return found


def _first_updates(model: MoAModel, layers: Mapping[str, Mixture], data: Batches, lr: float) -> dict[str, Tensor]:
    """Return by layer -lr · sign Σ ∂loss/∂W (o, i)."""
    with base_alone(model):
        found = weight_gradients(model, bases_of(layers), data, _loss)
    updates = {}
    for name in layers:
        (total,) = over_processes([found.pop(name).to(bank_of(layers[name]).core.device)])
        if not total.any():
            raise ConfigError(f"{name}: the gradient of its weight is 0 on these batches, which gives no direction.")
        updates[name] = -lr * total.sign()
    return updates


def _principal_inputs(model: MoAModel, layers: Mapping[str, Mixture], data: Batches) -> dict[str, tuple[Tensor, float]]:
    """Return by layer the E · r first principal components of its inputs (E · r, i), and the share along them."""
    wanted = {name: bank_of(mixture).n_experts * bank_of(mixture).rank for name, mixture in layers.items()}
    found: dict[str, Principal] = {}

    def add(name: str, rows: Tensor) -> None:
        found.setdefault(name, Principal(2 * wanted[name] + 16)).add(rows)

    n_batches = watch_inputs(model, layers, data, add)
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
