"""The start of experts that restore what quantising their base lost: QWHA."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..experts.frozen import weight_of
from ..layers import Site
from ..mixture import Mixture
from ..model.watched import Batches
from ..objective.exchange import over_processes
from .fresh import bank_of, fresh_layers, watch_inputs
from .originals import Original, Originals
from .restoration import Restored, coefficients, damped
from .start_options import check_start

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel

HELD = 2**28  # numbers of the layers' X^T X that are on the host together, 1 GB; the data goes through for each GB


def restore(model: MoAModel, data: Batches, original: Original, *, batches: int = 8) -> dict[str, Restored]:
    """Start fresh experts where they restore what a quantised base lost on some batches; nothing else changes.

    Each layer's coefficients are fitted to its inputs in the quantised model: min ‖(W0 - W - ΔW) X‖. All experts of a
    layer start there, so that a mixture whose weights sum to 1 restores it. The device holds one layer's matrices at a
    time, some ten of the size (i, i) or (o, i) in float64; X^T X of the layers are on the host, 1 GB at a time. A layer
    that lost nothing stays as it is.

    Args:
        model: fresh from `moa.build(…, expert="qwha", mask="given")`; changed in place.
        data: batches of its inputs on its device, input_ids (B, S) and so on.
        original: the weights before they were quantised: that model, its tensors by name, or a folder or file of
            safetensors.
        batches: how many of the batches are looked at.

    Returns:
        Layer -> relative error of its outputs before and after.

    Raises:
        ConfigError: experts that do not start so or that moved already, a layer without an original weight, or with one
            of another model, a base that lost nothing or has no values, no data, a layer that it does not reach, or one
            whose inputs are all 0. Nothing is changed.
        NumericsError: inputs that are not finite. Nothing is changed.
        CheckpointError: a folder or file of original weights that cannot be read.

    Source: arXiv 2509.17428, §3 and algorithm 1, and its released code.
    Differs: the released code takes X from the original model, on the test rows of WikiText-2; here it is what the
        quantised layer will see, of your data, padding left out. It solves with R, the root of X^T X, per channel; here
        the same systems are solved in the Walsh-Hadamard domain, where R cancels.
    """
    check_start("qwha", batches, None, original)
    layers, originals = fresh_layers(model, "qwha"), Originals(original)
    sites = {name: Site(name, m.base, bank_of(m).d_in, bank_of(m).d_out) for name, m in layers.items()}
    for name, site in sites.items():
        originals.key(name)
        if any(parameter.is_meta for parameter in site.module.parameters()):
            weight_of(site, "qwha")  # it refuses; what is offloaded is fetched
    sample = list(itertools.islice(data, batches))
    starts: dict[str, Tensor] = {}
    found: dict[str, Restored] = {}
    for group in _groups(layers):
        grams = _grams(model, group, sample)
        for name in group:
            start, found[name] = _start(sites[name], bank_of(layers[name]), originals, grams.pop(name))
            if start is not None:
                starts[name] = start
    if not starts:
        raise ConfigError(
            "the base's weights are the original ones: nothing was lost that could be restored. Build on the quantised "
            "base, and give the model that it was quantised from."
        )
    for name, start in starts.items():
        bank_of(layers[name]).begin_at("qwha", start)
    return found


def _groups(layers: Mapping[str, Mixture]) -> Iterator[dict[str, Mixture]]:
    """Yield the layers in turn, as many together as have X^T X (i, i) that the host holds."""
    group: dict[str, Mixture] = {}
    held = 0
    for name, mixture in layers.items():
        size = bank_of(mixture).d_in ** 2
        if group and held + size > HELD:
            yield group
            group, held = {}, 0
        group[name] = mixture
        held += size
    yield group


def _grams(model: MoAModel, layers: Mapping[str, Mixture], data: Batches) -> dict[str, Tensor]:
    """Return by layer X^T X (i, i) over batches and processes, in fp32 at least, on the host."""
    found: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        own = (rows.mT @ rows).cpu()
        found[name] = own if name not in found else found[name].add_(own)

    watch_inputs(model, layers, data, add)
    return found


@torch.no_grad()
def _start(site: Site, bank: Any, originals: Originals, gram: Tensor) -> tuple[Tensor | None, Restored]:
    """Return where a layer's experts start, (o, i) sparse, or None where it lost nothing, and what that restores."""
    weight = weight_of(site, "qwha").double()
    device = bank.values.device
    (gram,) = over_processes([gram.to(device)])
    whole = originals.weight(site).to(device).double()
    lost = whole - weight.to(device)
    if not lost.any():
        return None, Restored(0.0, 0.0)
    if lost.norm() >= whole.norm():
        raise ConfigError(
            f"{site.name}: 0 is nearer to its original weight than its quantised weight is: these are weights of "
            "another model."
        )
    gram = damped(gram, site.name)
    energy = float((whole @ gram * whole).sum())
    start, energies = coefficients(lost, gram, bank.transform, bank.values.shape[1])
    before, after = (energies.clamp(min=0) / energy).sqrt().tolist()
    return start, Restored(before, after)
