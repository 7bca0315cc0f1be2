"""One small adapter that clients of different backbones share: train the own model, then the adapter, never both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError, unknown_name
from .update import Update


class Alternation:
    """A client's model whose trained part falls into the adapter that all share, and everything else, its own.

    Each round: `phase("own")` trains everything but the adapter, `phase("shared")` the adapter and nothing else,
    `update()` goes to the server, and `load` takes what `aggregate` makes of all clients'.

    Args:
        model: of any kind and width; what trains of it is what asks for a gradient.
        shared: dotted names of the modules that are the adapter, in the same order at every client; their shapes are
            the same everywhere, their names need not be.

    Raises:
        ConfigError: a name that the model does not have; nothing in the adapter trains.

    Source: pFedLoRA, Yi et al. 2023, arXiv 2310.13283, algorithm 1.
    Differs: there the adapter lies beside the whole model and the loss mixes both outputs; here it is whatever module
        of the model it is, and the loss is the model's.
    """

    def __init__(self, model: nn.Module, shared: Sequence[str]) -> None:
        known = dict(model.named_modules())
        for name in shared:
            if name not in known:
                raise ConfigError(unknown_name("module", name, (n for n in known if n), type(model).__name__))
        self.model, self.shared = model, tuple(shared)
        inside = {id(p) for name in shared for p in known[name].parameters()}
        trained = [p for p in model.parameters() if p.requires_grad]
        self._parameters = {
            "own": [p for p in trained if id(p) not in inside],
            "shared": [p for p in trained if id(p) in inside],
        }
        if not self._parameters["shared"]:
            raise ConfigError(f"nothing in {', '.join(shared) or 'no module'} trains: name the modules of the adapter.")

    def parameters(self, which: Literal["own", "shared"]) -> list[nn.Parameter]:
        """Return what trains in a phase, of any shape: each has an optimizer of its own.

        Raises:
            ConfigError: an unknown phase.
        """
        if which not in self._parameters:
            raise ConfigError(unknown_name("phase", which, self._parameters))
        return self._parameters[which]

    @contextmanager
    def phase(self, which: Literal["own", "shared"]) -> Iterator[list[nn.Parameter]]:
        """Let one side train, and give its parameters, of any shape; the other's bits stay, buffers included.

        Frozen parameters have no gradient at all, so that neither momentum nor weight decay moves them; buffers that a
        forward moves, as a batch norm's, are put back.

        Raises:
            ConfigError: an unknown phase.
        """
        chosen = self.parameters(which)
        frozen = [p for one in self._parameters.values() for p in one if one is not chosen]
        kept = [(b, b.detach().clone()) for b in self._buffers(of_shared=which == "own")]
        for parameter in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        try:
            yield chosen
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.no_grad():
                for buffer, values in kept:
                    buffer.copy_(values)

    def update(self, weight: float = 1.0) -> Update:
        """Return the adapter for `aggregate`, tensors of any shape by their place in it.

        Args:
            weight: of this client, e.g. how many examples it has.
        """
        return Update(self._adapter(), weight, frozenset(self._adapter()))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the adapter that the server sends, tensors of any shape.

        Raises:
            ConfigError: other names than this adapter's.
            ShapeError: another shape.
        """
        own = self._adapter()
        if own.keys() != tensors.keys():
            raise ConfigError(f"only one side has {sorted(own.keys() ^ tensors.keys())[0]}: it is another adapter.")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise ShapeError(f"{name} is {tuple(tensor.shape)} here, and {tuple(tensors[name].shape)} came.")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def _adapter(self) -> dict[str, Tensor]:
        parts = [(n, self.model.get_submodule(name)) for n, name in enumerate(self.shared)]
        return {f"{n}.{key}": tensor.detach() for n, part in parts for key, tensor in part.state_dict().items()}

    def _buffers(self, of_shared: bool) -> list[Tensor]:
        inside = {id(b) for name in self.shared for b in self.model.get_submodule(name).buffers()}
        return [b for b in self.model.buffers() if (id(b) in inside) == of_shared]
