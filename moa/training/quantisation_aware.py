"""Experts trained as they will be deployed: folded into the weight, which is then rounded to integers.

He et al. 2023 (EfficientDM's quantisation-aware LoRA), arXiv 2310.03270.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import CheckpointError, ConfigError, ContextError
from ..experts.factored import FactoredBank
from ..experts.frozen import weight_of
from ..layers import Site
from ..mixture import Branch, Mixture
from ..model.host import Host
from .integers import Grid, IntegerLinear, Rounded, codes_of, row_scales

BITS = range(2, 9)
SHARE, SCALE_LR = 1 / 2500, 1e-6


@contextlib.contextmanager
def quantisation_aware(model: Host, bits: int = 4) -> Iterator[Host]:
    """Run every adapted layer on integers inside the block: W_q = s · clamp(round((W0 + ΔW) / s)), one s a row.

    Gradients pass the rounding as if it were not there, and stop where it clips. Without a change the layer is the
    quantised base, and `deployed` gives the weight of the block bit for bit.

    Args:
        model: whose routing is constant and whose experts hold factors (r, i), (r, o) on linear layers.
        bits: of a code, 2 to 8.

    Raises:
        ConfigError: a layer that has no one weight to round, named; bits out of range; inside `folded`.

    Source: arXiv 2310.03270, §3.2.
    Differs: s is that of W0 unless `learn_scales` came before, activations are not quantised, and nothing is distilled.
    """
    run_on_integers(model, bits)
    try:
        yield model
    finally:
        for mixture in model.mixtures().values():
            del mixture.forward


def run_on_integers(model: Host, bits: int = 4) -> None:
    """Run every adapted layer (*rows, i) -> (*rows, o) on integers from now on, as inside of `quantisation_aware`.

    Args:
        model: as there.
        bits: as there.

    Raises:
        ConfigError: as there.
    """
    model._check_not_folded("quantisation-aware training")
    for layer in _layers(model, bits):
        layer.mixture.forward = layer.forward  # type: ignore[method-assign]


def learn_scales(model: Host, bits: int = 4) -> None:
    """Make the scales s (o, 1) of all layers parameters, which start at W0's; call it before an optimizer is made.

    They are in the state dict, so that a run goes on with them, until `settle_scales`.

    Args:
        model: as in `quantisation_aware`.
        bits: as there.

    Raises:
        ConfigError: as there.

    Source: arXiv 2310.03270, §3.2, of weights.
    """
    for layer in _layers(model, bits):
        if layer.grid is None:
            layer.branch.grid = Grid(layer.scale, bits)


def settle_scales(model: Host) -> None:
    """Let the scales (o, 1) be what they have learned to be, no longer parameters: experts are saved without them."""
    for _, branch in model.branches():
        grid = getattr(branch, "grid", None)
        if grid is not None:
            grid.settle()


def write_scales(model: Host, file: str | Path) -> None:
    """Write the scales (o, 1) of all layers, which an experts' checkpoint does not hold, as safetensors.

    Args:
        model: after `settle_scales`.
        file: written to.

    Raises:
        ConfigError: none were learned.
    """
    grids = {name: grid for name, branch in model.branches() if (grid := getattr(branch, "grid", None)) is not None}
    if not grids:
        raise ConfigError("this model has learned no scales: call learn_scales before training.")
    bits = next(iter(grids.values())).bits
    tensors = {name: grid.scale.detach().contiguous() for name, grid in grids.items()}
    save_file(tensors, file, metadata={"bits": str(bits)})


def read_scales(model: Host, file: str | Path) -> int:
    """Give a model that was loaded the scales (o, 1) that `write_scales` wrote, and return the bits of a code.

    Args:
        model: with the same layers.
        file: read from.

    Raises:
        CheckpointError: no such file, or scales of other layers.
    """
    try:
        with safe_open(file, "pt") as opened:
            bits = int((opened.metadata() or {})["bits"])
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} holds no scales of quantisation-aware training: {error}.") from error
    layers = {layer.mixture.name: layer for layer in _layers(model, bits)}
    if {n: t.shape for n, t in found.items()} != {n: layer.scale.shape for n, layer in layers.items()}:
        raise CheckpointError(f"{file} holds scales of {', '.join(sorted(found)[:4])}, …: not this model's layers.")
    for name, layer in layers.items():
        layer.branch.grid = Grid(layer.scale, bits)
        layer.branch.grid.settle(found[name])
    return bits


def deployed(model: Host, bits: int = 4) -> nn.Module:
    """Return the base, (B, S) -> its outputs, with the mixtures folded in and rounded: every layer holds integers.

    Args:
        model: as in `quantisation_aware`; it loses its mixtures.
        bits: as in training.

    Raises:
        ConfigError: as `quantisation_aware`; nothing was changed.
    """
    model.check_outside("deployed")
    made, was = {}, model.training
    layers = _layers(model, bits)
    model.eval()  # some families draw ranks in training
    for layer in layers:
        with torch.no_grad():
            codes = codes_of(layer.weight(), layer.scale, layer.top)
        made[layer.mixture.name] = IntegerLinear(codes.to(torch.int8), layer.scale, layer.mixture.bias)
    base: Any = model.train(was)._without_mixtures()  # type: ignore[operator]  # what is trained whole stays
    for name, integer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, integer.train(base.training))
    return base  # type: ignore[no-any-return]


def scaled_groups(
    model: Host, lr: float, bits: int = 4, share: float = SHARE, scale_lr: float = SCALE_LR
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: a layer's experts step by the mean of its scales s times a share.

    Args:
        model: as in `quantisation_aware`.
        lr: of all other trained parameters, of any shape.
        bits: as in training.
        share: of the mean scale.
        scale_lr: of scales that are learned.

    Raises:
        ConfigError: as `quantisation_aware`.

    Source: arXiv 2310.03270, §3.3, scale-aware optimisation; 1 / 2500 and 1e-6 are the released code's.
    """
    groups, taken, scales = [], set(), []
    for layer in _layers(model, bits):
        if isinstance(layer.scale, nn.Parameter):
            taken.add(id(layer.scale))
            scales.append(layer.scale)
        own = [p for p in layer.bank.parameters() if p.requires_grad and id(p) not in taken]
        taken |= {id(p) for p in own}
        if own:
            groups.append({"params": own, "lr": float(layer.scale.detach().mean()) * share})
    if scales:
        groups.append({"params": scales, "lr": scale_lr, "weight_decay": 0.0})
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [*groups, {"params": rest, "lr": lr}] if rest else groups


class _Layer:
    """A mixture and the grid that its weight is rounded to."""

    def __init__(self, mixture: Mixture, bits: int) -> None:
        self.mixture = mixture
        branch = mixture.branches[0] if len(mixture.branches) == 1 else None
        bank = branch.bank if isinstance(branch, Branch) and branch.tap == "input" else None
        routing = branch.router.constant() if isinstance(branch, Branch) else None
        if type(mixture) is not Mixture or not isinstance(bank, FactoredBank) or routing is None or bank.dropout:
            raise ConfigError(
                f"{mixture.name}: only experts with factors on the input of a linear layer, without dropout, under a "
                "constant routing are one weight that can be rounded: build with router='fixed' and expert='lora'."
            )
        assert isinstance(branch, Branch)
        self.branch, self.bank, self.router, self.top = branch, bank, branch.router, 2 ** (bits - 1) - 1
        base: Any = mixture.base
        site = Site(mixture.name, base, bank.d_in, bank.d_out)
        self.frozen = weight_of(site, "of quantisation-aware training")  # (o, i)
        self.grid: Grid | None = getattr(branch, "grid", None)
        if self.grid is not None and self.grid.bits != bits:
            raise ConfigError(f"{mixture.name}: its scales were learned for bits={self.grid.bits}, not {bits}.")
        self.bits = bits

    @property
    def scale(self) -> Tensor:
        """The scales s (o, 1), W0's own unless they are learned."""
        return self._own if self.grid is None else self.grid.scale

    @functools.cached_property
    def _own(self) -> Tensor:
        return row_scales(self.frozen, self.bits)

    def weight(self) -> Tensor:
        """Return W0 + ΔW, (o, i), with a gradient for the experts."""
        routing = self.router.constant()
        assert routing is not None
        down, up = self.bank.factors()
        weights = routing.dense().reshape(-1).to(down) * self.bank.scaling  # (E,)
        return self.frozen + torch.einsum("e,ero,eri->oi", weights, up, down).to(self.frozen)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (*rows, o) for x (*rows, i)."""
        context = self.mixture.context
        if not context.enabled:
            return self.mixture.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        if context.pinned is not None or context.ranks is not None:
            raise ContextError(
                f"{self.mixture.name} runs on one weight of integers, which is the same for all examples: leave out "
                "adapter_ids, pinned experts and ranks."
            )
        if context.trace is not None:
            self.mixture.route(self.branch, x, context)  # to be seen
        rounded: Tensor = Rounded.apply(self.weight(), self.scale, self.top)  # type: ignore[no-untyped-call]
        return F.linear(x, rounded.to(x.dtype), self.mixture.bias)


def check_rates(bits: int, share: float, scale_lr: float) -> None:
    """Check what can be checked without a model; no tensors, so no shapes.

    Raises:
        ConfigError: bits that are not from 2 to 8, or learning rates that are negative or above 1.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise ConfigError(f"bits must be a whole number from {BITS.start} to {BITS.stop - 1}, got {bits!r}.")
    if not 0 < share <= 1000:
        raise ConfigError(f"share is of a layer's mean scale, above 0 and at most 1000, got {share}.")
    if not 0 <= scale_lr <= 1:
        raise ConfigError(f"scale_lr is a learning rate, from 0 to 1, got {scale_lr}.")


def _layers(model: Host, bits: int) -> list[_Layer]:
    check_rates(bits, SHARE, SCALE_LR)
    return [_Layer(mixture, bits) for mixture in model.mixtures().values()]
