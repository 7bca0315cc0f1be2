"""A sparse adapter in the base's own weights while a batch runs: its entries are written, and what was there back."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from ..delta import Delta, Undo


def weights_of(model: nn.Module, changes: Mapping[str, Delta]) -> dict[str, Tensor] | None:
    """Return the weight (o, i) of each layer with a change; None where one is not dense, or not one layer's own.

    Args:
        model: the base.
        changes: by layer, (o, i).
    """
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for layer, change in changes.items():
        weight = getattr(model.get_submodule(layer), "weight", None)
        fits = isinstance(weight, nn.Parameter) and weight.is_floating_point() and weight.shape == change.shape
        if not isinstance(weight, nn.Parameter) or not fits or owners[id(weight)] != 1:
            return None
        found[layer] = weight.data
    return found


@contextlib.contextmanager
def written(weights: Mapping[str, Tensor], changes: Mapping[str, Delta]) -> Iterator[None]:
    """Run the block with changes (o, i) in the weights (o, i); afterwards they are as they came, bit for bit.

    Source: Bhardwaj et al. 2024, arXiv 2406.13175, §4.2.
    Differs: peft adds and subtracts, which leaves rounding errors in the base.
    """
    undo: list[Undo] = []
    try:
        for layer, change in changes.items():
            undo.append(change.write_into(weights[layer]))
        yield
    finally:
        for one in reversed(undo):
            one.restore()
