"""Layers as linear maps of rows: their sizes, their weight as a matrix (o, i), a convolution's input as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import padding_of
from .errors import ConfigError, ShapeError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether module is transformers' Conv1D: a linear layer whose weight is stored (i, o)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_convolution(module: nn.Module) -> bool:
    """Tell whether module is a convolution, whose weight is (o, C / groups, *kernel): linear on patches of its input.

    PyTorch's transposed convolutions are not.
    """
    return isinstance(module, CONVOLUTIONS)


def features(module: nn.Module) -> tuple[int, int] | None:
    """Return (i, o) of a linear layer, dense or quantised, or of a convolution; None for any other module.

    Quantised linears are not all `nn.Linear`, but they all say how many features they have. A convolution's i are the
    values under its kernel.
    """
    if is_conv1d(module):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    if isinstance(module, CONVOLUTIONS):
        return module.weight[0].numel(), module.out_channels
    pairs = (("in_features", "out_features"), ("infeatures", "outfeatures"))
    for d_in, d_out in pairs:
        if isinstance(getattr(module, d_in, None), int) and isinstance(getattr(module, d_out, None), int):
            return int(getattr(module, d_in)), int(getattr(module, d_out))
    return None


def is_dense(weight: Any) -> bool:
    """Tell whether weight, of any shape, is a tensor of floats as such.

    Some libraries hide codes behind a subclass of Tensor that calls itself floating and knows few operations.
    """
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()


def matrix(base: nn.Module) -> Tensor | None:
    """Return the dense weight of a layer as a view (o, i), or None where it holds none, as quantised ones do."""
    weight: Any = getattr(base, "weight", None)
    if not is_dense(weight):
        return None
    if isinstance(base, CONVOLUTIONS):
        return weight.flatten(1) if base.groups == 1 else None
    if weight.ndim != 2:
        return None
    return weight.T if is_conv1d(base) else weight


def as_weight(base: nn.Module, change: Tensor) -> Tensor:
    """Return a matrix (o, i) in the shape in which a layer stores its weight."""
    if isinstance(base, CONVOLUTIONS):
        return change.view_as(base.weight)
    return change.T if is_conv1d(base) else change


def as_factors(base: nn.Module, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of down (r, i) and up (r, o) as PEFT stores them: (r, i), (o, r), or convolutions."""
    if isinstance(base, CONVOLUTIONS):
        return down.view(-1, *base.weight.shape[1:]), up.T[(..., *[None] * len(base.kernel_size))]
    return down, up.T


def patches(conv: nn.Module, x: Tensor) -> Tensor:
    """Return what a convolution multiplies by its weight: x (B, C, *size) as rows (B, L, C · kernel), L places.

    Raises:
        ShapeError: x without a batch axis.
    """
    assert isinstance(conv, CONVOLUTIONS)
    n_axes = len(conv.kernel_size)
    if x.ndim != n_axes + 2:
        raise ShapeError(
            f"a {type(conv).__name__} with experts needs x with a batch axis, {n_axes + 2} axes in all, got "
            f"{tuple(x.shape)}."
        )
    padding = padding_of(conv)
    if any(padding):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, padding, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(axis + 2, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places, kernel = (" ".join(f"{kind}{axis}" for axis in range(n_axes)) for kind in ("place", "size"))
    return rearrange(x, f"b c {places} {kernel} -> b ({places}) (c {kernel})")  # until here x was a view


@dataclass(frozen=True)
class Site:
    """A place that gets experts.

    Args:
        name: dotted name of the module.
        module: a layer (*rows, i) -> (*rows, o), or a block whose output is, or begins with, (B, S, d).
        d_in: i; d for a block.
        d_out: o; d for a block.
        shared: what all layers of one recipe have together, by who calls it: "experts", "routers".
        place: of the experts: on the layer's "input" x, on its "output", after a "block", or at a sub-layer,
            "sequential" or "parallel"; on an output d_in is the layer's d_out, in parallel d_out is the last layer's.
    """

    name: str
    module: nn.Module
    d_in: int
    d_out: int
    shared: Mapping[str, nn.Module] = field(default_factory=dict)
    place: str = "input"

    def weight(self) -> Tensor:
        """Return the layer's weight W0 (o, i), dequantised where the base is quantised.

        Raises:
            ConfigError: the module has no weight that can be read as one matrix.
        """
        found = dequantised(self.module)
        if found is None:
            raise ConfigError(
                f"{self.name} is a {type(self.module).__name__}, whose weight cannot be read as one matrix "
                f"({self.d_out}, {self.d_in}): choose a family that does not start from the base's weight."
            )
        return found


def dequantised(base: nn.Module) -> Tensor | None:
    """Return the weight of a layer as floats (o, i), through the quantising library's own way, or None.

    A dense weight comes as a view. Known ways: `weight.dequantize()` (torch, torchao, quanto), bitsandbytes'
    `dequantize_4bit` and its int8 statistics, and a module's own `dequantize()` or `get_weight()`.
    """
    dense = matrix(base)
    if dense is not None:
        return dense
    weight: Any = getattr(base, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor):  # PyTorch's quantised layers unpack it
        weight = weight()
    if isinstance(weight, Tensor) and hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    scales = getattr(weight, "SCB", None)
    if isinstance(weight, Tensor) and scales is not None:
        return weight.data * scales.view(-1, 1) / 127  # bitsandbytes int8: one absolute maximum a row
    if isinstance(weight, Tensor) and hasattr(weight, "dequantize") and not is_dense(weight):
        found: Tensor = weight.dequantize()
        return found if is_dense(found) and found.ndim == 2 else None
    return None
