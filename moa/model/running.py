"""Running statistics, as batch norm has: those of the frozen base stay, those that are trained move once a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn


def with_statistics(module: nn.Module) -> list[nn.Module]:
    """Return the modules inside one that average over what they see in training, e.g. a mean of (C,), by its name."""
    return [m for m in module.modules() if any(n.startswith("running_") and b is not None for n, b in _own(m))]


def hold_still(base: nn.Module, trained_whole: Sequence[nn.Module]) -> None:
    """Let the statistics (C,) of a frozen base stay as they came: in training it normalises by them, as in evaluation.

    A forward in training mode would move them with no gradient and no optimizer, M times under M selections, and no
    checkpoint of experts would hold them.

    Args:
        base: frozen but for what is trained whole.
        trained_whole: modules of it, whose statistics are trained and saved with them.
    """
    free = {id(m) for whole in trained_whole for m in whole.modules()}
    for module in with_statistics(base):
        module.train(id(module) in free and base.training)


@contextlib.contextmanager
def moved_once(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Keep the statistics (C,) of modules as they are before the block, whose forward sees the same batch again."""
    kept: list[tuple[Tensor, Tensor]] = [
        (buffer, buffer.clone())
        for module in modules
        for inner in with_statistics(module)
        for _, buffer in _own(inner)
        if buffer is not None
    ]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)  # in the graph of the first forward: its version is not to change


def _own(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return list(module._buffers.items())
