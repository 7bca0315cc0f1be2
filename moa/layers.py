"""Layers as linear maps of rows: their sizes, their weight as a matrix (o, i), a convolution's input as rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .compat import padding_of
from .errors import ConfigError, ShapeError
from .offload import brought_in

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

    Some libraries hide codes behind a subclass of Tensor that calls itself floating and knows few operations. Floats of
    8 bits are codes: what they mean is said by a scale beside them.
    """
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1


def holds_codes(module: nn.Module) -> bool:
    """Tell whether a module without children holds a matrix of codes, integers or floats of 8 bits, as packed ones do.

    Tables of embeddings are not counted, nor 64-bit integers, which are positions.
    """
    if hasattr(module, "num_embeddings") or any(True for _ in module.children()):
        return False
    own = [*module.parameters(), *module.buffers()]
    return any(t.ndim >= 2 and t.dtype not in (torch.bool, torch.int64) and not _is_wide(t.dtype) for t in own)


def _is_wide(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point and dtype.itemsize > 1) or dtype.is_complex


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
        """Return the layer's weight W0 (o, i), dequantised where the base is quantised, fetched where it is offloaded.

        Raises:
            ConfigError: the module has no weight that can be read as one matrix, or cannot run where it would say it.
        """
        why = "choose a family that does not start from the base's weight."
        kind = type(self.module).__name__
        try:
            with brought_in(self.module):
                found = dequantised(self.module)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"{self.name}: reading the weight of a {kind} failed ({error}): {why}") from error
        if found is None:
            raise ConfigError(
                f"{self.name} is a {kind}, whose weight cannot be read as one matrix ({self.d_out}, {self.d_in}): {why}"
            )
        return found


def dequantised(base: nn.Module) -> Tensor | None:
    """Return the weight of a layer as floats (o, i), a dense one as a view; None where nothing says it.

    The quantising library's own way comes first: `weight.dequantize()` (torch, torchao, quanto), the layer's own (HQQ),
    bitsandbytes' functions for its 4 bits and its statistics for 8. Any other layer of known sizes (GPTQ, AWQ, AQLM, …)
    says its weight itself: its outputs for unit vectors are the columns.
    """
    dense = matrix(base)
    if dense is not None:
        return dense
    found = _unpacked(base)
    return _answers(base) if found is None else found


def _unpacked(base: nn.Module) -> Tensor | None:
    """Return the weight (o, i) of a quantised layer as its library unpacks it, None where it has no way of its own."""
    weight: Any = getattr(base, "weight", None)
    if callable(weight) and not isinstance(weight, Tensor):  # PyTorch's quantised layers unpack it
        weight = weight()
    state = getattr(weight, "quant_state", None)
    if state is not None:
        if getattr(state, "packing_format_for_cpu", False):
            return None  # bitsandbytes has put the codes in an order that only its forward on CPUs reads
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    scales = getattr(weight, "SCB", None)
    if scales is None:  # the first forward takes them to the layer's state
        scales = getattr(getattr(base, "state", None), "SCB", None)
    if scales is not None:
        return weight.data * scales.view(-1, 1) / 127  # type: ignore[no-any-return]  # one absolute maximum a row
    plain = type(weight) in (Tensor, nn.Parameter) and not weight.is_quantized
    holder = weight if isinstance(weight, Tensor) and not plain else base
    unpack = getattr(holder, "dequantize", None)
    found = unpack() if callable(unpack) else None
    return found if isinstance(found, Tensor) and is_dense(found) and found.ndim == 2 else None


@torch.no_grad()
def _answers(base: nn.Module, at_once: int = 1024) -> Tensor | None:
    """Return the weight (o, i) of a layer of known sizes from its outputs, None where it is not a linear map of x.

    Args:
        base: called in evaluation mode.
        at_once: unit vectors in one call.
    """
    size = features(base)
    if size is None or is_convolution(base):
        return None
    own = [*base.parameters(), *base.buffers()]
    device = own[0].device if own else torch.device("cpu")
    dtype = next((t.dtype for t in own if _is_wide(t.dtype)), torch.float32)
    was = base.training
    base.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            probe = torch.linspace(-1, 1, size[0], device=device, dtype=dtype)
            first = base(torch.stack([torch.zeros_like(probe), probe]).unsqueeze(0))
            if not is_dense(first) or first.shape != (1, 2, size[1]):
                return None
            shift, expected = first[0]  # (o,)
            columns = [
                base(rows.unsqueeze(0))[0] - shift
                for rows in torch.eye(size[0], device=device, dtype=dtype).split(at_once)
            ]
    finally:
        base.train(was)
    weight = torch.cat(columns).T  # (o, i)
    change = (expected - shift).float()
    error = (weight.float() @ probe.float() - change).norm()
    linear = bool(error <= 0.1 * change.norm())  # layers that round x to a few bits are this far off
    return weight.contiguous() if linear else None
