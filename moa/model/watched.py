"""What passes through a model's linear layers while it runs: their inputs as rows, the gradients of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, NumericsError
from ..layers import is_convolution, patches

Batches = Iterable[Mapping[str, Any]]
Watch = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


@contextmanager
def watched(layers: Mapping[str, nn.Module], watch: Watch) -> Iterator[None]:
    """Look at layers whenever they run inside the block.

    Args:
        layers: by name.
        watch: called with a layer's name, the layer, its input x (*rows, i) and its output (*rows, o), for a
            convolution (B, C, *size) and (B, o, *places); what it returns takes the output's place.
    """

    def hook(name: str) -> Callable[..., Any]:
        return lambda module, given, output: watch(name, module, given[0], output)

    with ExitStack() as stack:
        for name, module in layers.items():
            stack.callback(module.register_forward_hook(hook(name)).remove)
        yield


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Run a model, (B, S) -> its outputs, in evaluation mode inside; each module has its own mode again afterwards."""
    was = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in was:
            module.training = mode


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return the rows (*rows, i) that a layer multiplies by its weight, of its input x."""
    return patches(module, x) if is_convolution(module) else x


def check_reached(layers: Iterable[str], found: Mapping[str, Any], n_batches: int) -> None:
    """Check that there was data, and that it went through every layer; no tensors, so no shapes.

    Raises:
        ConfigError: it did not.
    """
    if not n_batches:
        raise ConfigError("there is no data: at least one batch is needed.")
    missing = [name for name in layers if name not in found]
    if missing:
        raise ConfigError(
            f"{missing[0]} and {len(missing) - 1} more layers were not reached by {n_batches} batches: leave them out "
            "of targets, or give data that goes through them."
        )


def weight_gradients(
    model: Callable[..., Any], layers: Mapping[str, nn.Module], data: Batches, loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """Return the loss's gradient to each layer's weight, (o, i) in fp32 at least, summed over batches, on the host.

    Weights need not ask for a gradient, and may be quantised; nothing else gets one either. The device holds the
    gradient of one layer at a time.

    Args:
        model: called with each batch.
        layers: by name.
        data: keywords of the model.
        loss: of its outputs, ().

    Raises:
        ConfigError: no batch, or a layer that the data does not reach.
        NumericsError: a gradient with NaN or infinity, by layer.
    """
    sums: dict[str, Tensor] = {}
    probes: list[Tensor] = []

    def watch(name: str, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        x = x.detach()

        def add(gradient: Tensor) -> None:
            gradient = gradient.flatten(2).mT if is_convolution(module) else gradient
            wide = torch.promote_types(gradient.dtype, torch.float32)
            own = gradient.flatten(0, -2).to(wide).mT @ rows_of(module, x).flatten(0, -2).to(wide)  # (o, i)
            kept = own.cpu()
            sums[name] = kept if name not in sums else sums[name].add_(kept)

        # a zero that asks for a gradient, so that the output has one whatever lies before it
        probe = output.new_zeros((), requires_grad=True)
        probes.append(probe)
        out = output + probe
        out.register_hook(add)
        return out

    n_batches = 0
    with watched(layers, watch), torch.enable_grad():
        for batch in data:
            n_batches += 1
            value = loss(model(**batch))
            if not probes:
                continue  # said below
            torch.autograd.grad(value, probes, allow_unused=True)
            probes.clear()
    check_reached(layers, sums, n_batches)
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise NumericsError(f"{name}: its gradient holds NaN or infinity on these batches.")
    return sums
