"""What a function makes of parameters for all layers at once, kept until one of the parameters changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ..compat import is_autocast, is_captured, is_transformed, working_node

Tensors = Sequence[Tensor]
Function = Callable[[Tensors, Tensors], Sequence[Tensors]]


class Kept:
    """Values that a function makes of shared parameters and of one parameter for each layer.

    They are made for all layers together when one of them asks first, and again once a parameter that this layer reads
    has changed, or after `end`. With a gradient the layers share one node of the graph, which any number of backward
    passes may go through, and after the first of them the next forward makes new ones: not every optimizer tells
    PyTorch that it has written. A copy has made nothing.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None

    def find(self, shared: Tensors, own: Tensor) -> Tensors | None:
        """Return a layer's values, of any shape, if they are there and up to date.

        Args:
            shared: those of the shared parameters that the layer reads.
            own: the layer's parameter.
        """
        made = self._made
        return None if made is None else made.of((*shared, own))

    def make(self, shared: Tensors, own: Tensors, function: Function) -> None:
        """Make the values of all layers, of any shape.

        Args:
            shared: all shared parameters.
            own: a parameter for each layer, no two the same.
            function: of both -> values of each layer. It has no state, and reads no other tensors.
        """
        self._made = _Made(shared, own, function)

    def end(self) -> None:
        """Let the next forward make the values, of any shape, anew."""
        made = self._made
        if made is not None:
            made.run.ended = True

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def may_keep(tensor: Tensor) -> bool:
    """Return whether values made here of a tensor, of any shape, may be used later.

    Not where what runs is recorded, to run again on other values.
    """
    return not torch.compiler.is_compiling() and not is_transformed() and not is_captured(tensor)


def is_at_hand(tensor: Tensor) -> bool:
    """Return whether a tensor, of any shape, is a parameter that counts its changes and lies here whole."""
    if type(tensor) is not nn.Parameter or tensor.is_meta or tensor.is_inference():
        return False
    return not hasattr(tensor, "ds_tensor")  # ZeRO-3 brings and takes its values


class _Made:
    """Values, and how the parameters that they were made of were then."""

    def __init__(self, shared: Tensors, own: Tensors, function: Function) -> None:
        tensors = (*shared, *own)
        self.surroundings = _surroundings(own[0])
        self.written = {id(t): (t, t._version, t.data_ptr(), t.requires_grad) for t in tensors}
        self.has_graph = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        self.run = _Run(function, len(shared))
        with torch.inference_mode(False):  # what is made there can be used there only
            if self.has_graph:
                with torch.enable_grad():
                    flat: Tensors = _Together.apply(self.run, *tensors)
            else:
                with torch.no_grad():
                    flat = self.run.values([t.detach() for t in tensors])
        found = iter(flat)
        self.values = {id(t): [next(found) for _ in range(n)] for t, n in zip(own, self.run.counts, strict=True)}

    def of(self, read: Tensors) -> Tensors | None:
        """Return the values (any shape) of the layer whose parameter is the last of those that it reads."""
        grad = torch.is_grad_enabled()
        if (self.run.ended and working_node() is None) or self.surroundings != _surroundings(read[-1]):
            return None
        for tensor in read:
            known = self.written.get(id(tensor))
            if known is None or known[1:] != (tensor._version, tensor.data_ptr(), tensor.requires_grad):
                return None
            if grad and tensor.requires_grad and not self.has_graph:
                return None
        values = self.values.get(id(read[-1]))
        return [value.detach() for value in values] if values and self.has_graph and not grad else values


class _Run:
    """One run of the function; it holds no value that holds it.

    Attributes:
        ended: the next forward wants another one.
        counts: how many values each layer has.
    """

    def __init__(self, function: Function, n_shared: int) -> None:
        self.function, self.n_shared, self.counts = function, n_shared, list[int]()
        self.ended = working_node() is not None  # a block that runs again in backward: for this pass only

    def values(self, tensors: Tensors) -> list[Tensor]:
        """Return the values of all layers, any shape, one layer after the other."""
        found = self.function(tensors[: self.n_shared], tensors[self.n_shared :])
        self.counts = [len(values) for values in found]
        return [value for values in found for value in values]

    def record(self, tensors: Tensors) -> list[Tensor]:
        """Return the same, any shape, with a graph of its own.

        Nobody's hooks look at it: a checkpoint would drop its parts.
        """
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            self.leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]  # without the parameters' hooks
            self.outs = self.values(self.leaves)
        self.versions = [t._version for t in self.leaves]
        return self.outs

    def gradients(self, above: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return those of the parameters, any shape; None of what was in no value that has a gradient.

        Raises:
            RuntimeError: a parameter has been written to since.
        """
        self.ended = True
        if [t._version for t in self.leaves] != self.versions:
            raise RuntimeError(
                "parameters that the factors of several layers are made of were modified by an inplace operation "
                "between this forward and its backward: go backward before the optimizer's step."
            )
        layers = [layer for layer, n in enumerate(self.counts) for _ in range(n)]
        given = [
            (out, grad, layer) for out, grad, layer in zip(self.outs, above, layers, strict=True) if grad is not None
        ]
        used = {layer for *_, layer in given}
        asked = [
            t.requires_grad and (n < self.n_shared or n - self.n_shared in used) for n, t in enumerate(self.leaves)
        ]
        leaves = [t for t, wanted in zip(self.leaves, asked, strict=True) if wanted]
        outs, grads = [out for out, *_ in given], [grad for _, grad, _ in given]
        # the graph stays, for another backward pass through other layers
        found = iter(torch.autograd.grad(outs, leaves, grads, retain_graph=True, allow_unused=True) if leaves else ())
        return [next(found) if wanted else None for wanted in asked]


class _Together(torch.autograd.Function):
    """The values of all layers as one node of the graph, of the shared parameters and those of each layer."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.run = run  # and no tensor saved, so that it may run again
        ctx.set_materialize_grads(False)
        outs = run.record(tensors)
        values = tuple(out.detach() for out in outs)
        ctx.mark_non_differentiable(*(v for v, out in zip(values, outs, strict=True) if not out.requires_grad))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *ctx.run.gradients(above)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _surroundings(tensor: Tensor) -> tuple[torch.dtype | None, int]:
    """Return what else values depend on: the dtype of autocast, and the stream of the device that has made them."""
    kind = tensor.device.type
    dtype = torch.get_autocast_dtype(kind) if is_autocast() and torch.is_autocast_enabled(kind) else None
    return dtype, torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
