"""What one client brings to a round: its trained tensors, and what the server must know to make one of many."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from ..experts import ExpertBank
from ..model.moa_model import MoAModel
from .aggregators import aggregator


@dataclass(frozen=True, eq=False)
class Update:
    """A client's adapters after its training, as `update_of` reads them from a model.

    Args:
        tensors: every tensor of a checkpoint, by name, of any shape.
        weight: of the client, e.g. how many examples it has.
        trained: names among them that training moves: what is sent.
        scalings: by the name of a bank whose down (E, r, i) and up (E, r, o) are the factors of its changes, their s.
        curved: by the name of a bank whose changes are not a mean where its tensors are, its class.
        constants: by the name of a tensor of experts that stays as it is, in a checkpoint or not, a digest of it; and
            the s of experts that are not factors.
    """

    tensors: Mapping[str, Tensor]
    weight: float
    trained: frozenset[str]
    scalings: Mapping[str, float] = field(default_factory=dict)
    curved: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)

    def sent(self) -> dict[str, Tensor]:
        """Return the tensors of any shape that a client sends, by name."""
        return {name: tensor for name, tensor in self.tensors.items() if name in self.trained}

    def sent_bytes(self) -> int:
        """Return what a client sends, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.sent().values())


def update_of(model: MoAModel, weight: float = 1.0) -> Update:
    """Return what a model's training changes; tensors of any shape are the model's own, not copies.

    Args:
        model: a client's, or the server's.
        weight: of the client, e.g. how many examples it has.
    """
    tensors = model.adapter_state_dict()
    scalings, curved, constants, moved = {}, {}, {}, set()
    for prefix, module in model.named_modules():
        in_bank = isinstance(module, ExpertBank)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if parameter.requires_grad:
                moved.add(name)
            elif in_bank:
                constants[name] = _digest(parameter)
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name in tensors and not in_bank:  # a router's statistics
                moved.add(name)
            elif in_bank:
                constants[name] = _digest(buffer)
        if in_bank:
            if _is_factored(module):
                scalings[prefix] = module.scaling
                continue
            constants[f"{prefix}.scaling"] = repr(module.scaling)  # the mean of such tensors knows one s
            if not module.averages and next(module.parameters(recurse=False), None) is not None:
                curved[prefix] = type(module).__name__
    return Update(tensors, weight, frozenset(moved & tensors.keys()), scalings, curved, constants)


def prepare(model: MoAModel, method: str) -> MoAModel:
    """Freeze the side of the factors that a method's clients do not train, and return the model, (B, S) as before.

    Args:
        model: a client's, or the server's, changed in place.
        method: a row of `AGGREGATORS`.

    Raises:
        ConfigError: an unknown method; experts whose changes have no exact mean under an exact method; "fedsb" with
            experts that are not cores, whose up factors would stay zero.
    """
    row = aggregator(method)
    known = update_of(model)
    if row.exact and known.curved:
        name, kind = next(iter(known.curved.items()))
        raise ConfigError(curved_message(method, name, kind))
    if row.frozen == "up" and known.scalings:
        raise ConfigError(
            f"{next(iter(known.scalings))}: {method!r} trains cores between bases that all share, and these experts "
            "are pairs of factors: build with expert='core'."
        )
    if row.frozen is not None:
        for name in known.scalings:
            getattr(model.get_submodule(name), row.frozen).requires_grad_(False)
    return model


def curved_message(method: str, name: str, kind: str) -> str:
    """Return why an exact method refuses a bank, by its name and its class."""
    return (
        f"{name}: {method!r} is exact, and the changes of {kind} experts are not linear in their tensors: choose "
        "'fedit', which takes the mean of tensors, or another family ('lora', 'core', 'shira', 'paca', 'ia3')."
    )


def _is_factored(bank: ExpertBank) -> bool:
    """Whether a bank's parameters are its factors, and not what they are made from."""
    found, own = bank.factors(), dict(bank.named_parameters(recurse=False))
    return found is not None and found[0] is own.get("down") and found[1] is own.get("up")


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
