"""Running statistics, as batch norm has: those of the frozen base stay, those that are trained move once a step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import MoaWarning
from ..formats.checkpoint import original_name, some_values


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


def marks(base: nn.Module, saved_whole: Sequence[nn.Module] = ()) -> dict[str, list[float]]:
    """Return a few values of each floating buffer, of any shape, that a frozen base's state holds, by its name.

    Args:
        base: with or without mixtures inside.
        saved_whole: modules of it whose buffers a checkpoint holds.
    """
    saved = {id(m) for whole in saved_whole for m in whole.modules()}
    found = {}
    for path, module in base.named_modules():
        if id(module) in saved or ".branches." in f".{path}.":
            continue
        for name, buffer in _own(module):
            if buffer is None or name in module._non_persistent_buffers_set or type(buffer) is not Tensor:
                continue
            if buffer.is_floating_point() and not buffer.is_meta and buffer.numel():
                found[original_name(f"{path}.{name}" if path else name)] = some_values(buffer, 4)
    return found


def warn_of_moved(came: Mapping[str, list[float]], base: nn.Module, saved_whole: Sequence[nn.Module]) -> None:
    """Warn if buffers of a frozen base, of any shape, are not what they were: no checkpoint of experts holds them.

    Args:
        came: what `marks` gave of the base as it came.
        base: as it is when it is saved.
        saved_whole: modules of it whose buffers the checkpoint holds.
    """
    now = marks(base, saved_whole)
    moved = [n for n in came.keys() & now.keys() if not _close(came[n], now[n])]
    if moved:
        warnings.warn(
            f"{len(moved)} buffers of the frozen base have moved since the model was built and are not in this "
            f"checkpoint ({min(moved)}, …): the base that it is loaded on will give other outputs. Save the base as "
            "well, or name the modules in modules_to_save.",
            MoaWarning,
            stacklevel=4,
        )


def _close(one: list[float], other: list[float]) -> bool:
    return torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-2, atol=1e-5, equal_nan=True)


def _own(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    return list(module._buffers.items())
