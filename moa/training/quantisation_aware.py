"""Experts trained as they will be deployed: folded into the weight, which is then rounded to integers.

He et al. 2023 (EfficientDM's quantisation-aware LoRA), arXiv 2310.03270.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError
from ..experts.factored import FactoredBank
from ..experts.frozen import weight_of
from ..layers import Site
from ..mixture import Branch, Mixture
from ..model.host import Host

BITS = range(2, 9)


@contextlib.contextmanager
def quantisation_aware(model: Host, bits: int = 4) -> Iterator[Host]:
    """Run every adapted layer on integers inside the block: W_q = s · clamp(round((W0 + ΔW) / s)), one s a row of W0.

    Gradients pass the rounding as if it were not there, and stop where it clips. Without a change the layer is the
    quantised base, and `deployed` gives the weight of the block bit for bit.

    Args:
        model: whose routing is constant and whose experts hold factors (r, i), (r, o) on linear layers.
        bits: of a code, 2 to 8.

    Raises:
        ConfigError: a layer that has no one weight to round, named; bits out of range; inside `folded`.

    Source: arXiv 2310.03270, §3.2.
    Differs: s stays as it is in W0 and is not trained, activations are not quantised, and nothing is distilled.
    """
    model._check_not_folded("quantisation-aware training")
    layers = _layers(model, bits)
    for layer in layers:
        layer.mixture.forward = layer.forward  # type: ignore[method-assign]
    try:
        yield model
    finally:
        for layer in layers:
            del layer.mixture.forward


def deployed(model: Host, bits: int = 4) -> nn.Module:
    """Return the base, (B, S) -> its outputs, with the mixtures folded in and rounded: every layer holds integers.

    Args:
        model: as in `quantisation_aware`; it loses its mixtures.
        bits: as in training.

    Raises:
        ConfigError: as `quantisation_aware`; nothing was changed.
    """
    made, was = {}, model.training
    layers = _layers(model, bits)
    model.eval()  # some families draw ranks in training
    for layer in layers:
        with torch.no_grad():
            codes = _codes(layer.weight(), layer.scale, layer.top)
        made[layer.mixture.name] = IntegerLinear(codes.to(torch.int8), layer.scale, layer.mixture.bias)
    base: Any = model.train(was).unload()  # type: ignore[operator]
    for name, integer in made.items():
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, integer.train(base.training))
    return base  # type: ignore[no-any-return]


def scaled_groups(model: Host, lr: float, bits: int = 4, share: float = 1 / 2500) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: a layer's experts step by the mean of its scales s times a share.

    Args:
        model: as in `quantisation_aware`.
        lr: of all other trained parameters, of any shape.
        bits: as in training.
        share: of the mean scale.

    Raises:
        ConfigError: as `quantisation_aware`.

    Source: arXiv 2310.03270, §3.3, scale-aware optimisation; 1 / 2500 is the released code's.
    """
    groups, taken = [], set()
    for layer in _layers(model, bits):
        own = [p for p in layer.bank.parameters() if p.requires_grad and id(p) not in taken]
        taken |= {id(p) for p in own}
        if own:
            groups.append({"params": own, "lr": float(layer.scale.mean()) * share})
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [*groups, {"params": rest, "lr": lr}] if rest else groups


class IntegerLinear(nn.Module):
    """y = x (s · codes)^T + b, a frozen linear layer of integers.

    Args:
        codes: (o, i) int8.
        scale: (o, 1).
        bias: (o,) or None.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias if bias is None else bias.detach())

    def dequantize(self) -> Tensor:
        """Return s · codes, (o, i)."""
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (*rows, o) for x (*rows, i)."""
        bias: Any = self.bias
        return F.linear(x, self.dequantize().to(x.dtype), bias)


def row_scales(weight: Tensor, bits: int) -> Tensor:
    """Return one scale a row, (o, 1), of a weight (o, i): that of the integers it holds already, else max |w| / top.

    Args:
        weight: dense, or what a library's integers of one scale a row mean.
        bits: of a code, symmetric: from -top to top, top = 2^(bits - 1) - 1.
    """
    top = 2 ** (bits - 1) - 1
    largest = weight.abs().amax(1, keepdim=True)  # (o, 1)
    scale = torch.where(largest > 0, largest / top, 1)
    found = torch.zeros_like(largest, dtype=torch.bool)
    for most in range(top, 0, -1):  # the largest integer that the row holds
        codes = weight * (most / largest.clamp(min=torch.finfo(weight.dtype).tiny))
        whole = ((codes - codes.round()).abs() < 1e-3).all(1, keepdim=True) & (largest > 0) & ~found
        scale = torch.where(whole, largest / most, scale)
        found |= whole
    return scale


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
        self.bank, self.router, self.top = bank, branch.router, 2 ** (bits - 1) - 1
        base: Any = mixture.base
        site = Site(mixture.name, base, bank.d_in, bank.d_out)
        self.frozen = weight_of(site, "of quantisation-aware training")  # (o, i)
        self.scale = row_scales(self.frozen, bits)  # (o, 1)

    def weight(self) -> Tensor:
        """Return W0 + ΔW, (o, i), with a gradient for the experts."""
        routing = self.router.constant()
        assert routing is not None
        down, up = self.bank.factors()
        weights = routing.dense().reshape(-1).to(down) * self.bank.scaling  # (E,)
        return self.frozen + torch.einsum("e,ero,eri->oi", weights, up, down).to(self.frozen)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output (*rows, o) for x (*rows, i)."""
        if not self.mixture.context.enabled:
            return self.mixture.base(x, *args, **kwargs)  # type: ignore[no-any-return]
        rounded: Tensor = _Rounded.apply(self.weight(), self.scale, self.top)
        return F.linear(x, rounded.to(x.dtype), self.mixture.bias)


class _Rounded(torch.autograd.Function):
    """s · clamp(round(W / s)) of W (o, i), whose gradient is 1 where nothing is clipped and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, top: int) -> Tensor:
        ctx.save_for_backward((weight / scale).abs() <= top * (1 + 1e-6))
        return _codes(weight, scale, top) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, 0), None, None


def _codes(weight: Tensor, scale: Tensor, top: int) -> Tensor:
    """Return the integers (o, i) of a weight, in its own dtype."""
    return (weight / scale).round().clamp(-top, top)


def _layers(model: Host, bits: int) -> list[_Layer]:
    if isinstance(bits, bool) or bits not in BITS:
        raise ConfigError(f"bits must be a whole number from {BITS.start} to {BITS.stop - 1}, got {bits!r}.")
    return [_Layer(mixture, bits) for mixture in model.mixtures().values()]
