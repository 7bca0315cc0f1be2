"""A client's side of a round: the server's adapters cut to its own rank, trained by its own code, sent back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ..delta import Dense, Undo
from ..errors import ConfigError, ShapeError
from ..mixture import Mixture
from ..model.moa_model import MoAModel
from .screening import Reply, fingerprint
from .server import Download
from .update import Update, update_of


@contextmanager
def received(model: MoAModel, download: Download) -> Iterator[MoAModel]:
    """Give a model, (B, S) -> its outputs, the server's adapters; its base is as it came again afterwards.

    Factors of a larger rank are cut to the client's: their first rows. Its own s takes the place of the server's.

    Args:
        model: the client's, changed in place.
        download: of this round.

    Raises:
        ConfigError: a name that this model does not have, or a rank above the server's.
        ShapeError: a tensor of another shape.
    """
    known = update_of(model)
    for name, tensor in download.tensors.items():
        if name not in known.tensors:
            raise ConfigError(f"{name} came from the server, and this model has nothing of that name.")
        _copy(name, tensor, known, download.scalings)
    undone: list[Undo] = []
    try:
        undone = _add_to_bases(model, download.residuals)
        yield model
    finally:
        for undo in undone:
            undo.restore()


def reply_of(model: MoAModel, examples: float, names: Mapping[str, Tensor] | frozenset[str]) -> Reply:
    """Return what a client sends after its training: copies of tensors of any shape.

    Args:
        model: trained.
        examples: how many it trained on.
        names: of the download: what the server shares, and nothing else.
    """
    update = update_of(model)
    tensors = {name: update.tensors[name].clone() for name in sorted(names)}
    return Reply(tensors, examples, dict(update.scalings), fingerprint(update))


@torch.no_grad()
def _copy(name: str, tensor: Tensor, known: Update, scalings: Mapping[str, float]) -> None:
    own = known.tensors[name]
    bank, _, side = name.rpartition(".")
    if bank in known.scalings:
        if tensor.shape[1] < own.shape[1]:
            raise ConfigError(f"{name} has rank {own.shape[1]} here, above the server's {tensor.shape[1]}: lower it.")
        tensor = tensor[:, : own.shape[1]]
        # both sides may train; a frozen one is not sent, and the other takes up the scale
        if side == "up" or f"{bank}.up" not in known.trained:
            tensor = tensor * (scalings[bank] / known.scalings[bank])
    if tensor.shape != own.shape:
        raise ShapeError(f"{name} has shape {tuple(own.shape)} here, and {tuple(tensor.shape)} came from the server.")
    own.copy_(tensor)


def _add_to_bases(model: MoAModel, residuals: Mapping[str, Tensor]) -> list[Undo]:
    """Add changes (o, i) to the weights below banks, and return what takes them back, the last one first."""
    banks = {
        f"{name}.branches.{n}.bank": module
        for name, module in model.named_modules()
        if isinstance(module, Mixture)
        for n in range(len(module.branches))
    }
    undone: list[Undo] = []
    for bank, change in residuals.items():
        mixture = banks.get(bank)
        if mixture is None or mixture.why_not_fold is not None or not mixture.is_dense():
            raise ConfigError(
                f"{bank}: the server's residual is for the base below it, which has no dense weight here."
            )
        (part,) = mixture.slices()
        for name, stored in mixture.stored(part, [(change, None)]).items():
            undone.insert(0, Dense(stored).write_into(getattr(mixture.base, name).data))
    return undone
