"""Layers as linear maps of rows: their sizes, their weight as a matrix (o, i), a convolution's input as rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .errors import ShapeError

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
    if any(conv._reversed_padding_repeated_twice):
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(axis + 2, (size - 1) * dilation + 1, stride)[..., ::dilation]
    places = x.shape[2 : 2 + n_axes].numel()  # x is (B, C, *places, *kernel), still a view
    order = (0, *range(2, 2 + n_axes), 1, *range(2 + n_axes, 2 + 2 * n_axes))
    return x.permute(order).reshape(x.shape[0], places, -1)
