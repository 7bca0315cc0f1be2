"""The base as it came, as a model of its own: what preference training compares a mixture with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .host import Host


class Reference(nn.Module):
    """A view of a model whose every forward runs with the adapter disabled, and without a gradient.

    It has no tensors of its own, and none of the model's in its state: it costs nothing, and training the model never
    moves it. What else is read of it is the model's.

    Args:
        model: the mixture.
    """

    def __init__(self, model: Host) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: `train`, `to` and a state dict pass it by
        self.requires_grad_(False).eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the forward returns, one that a library has put in its place included."""
        model: Host = self.__dict__["model"]
        with model.scope.turns.alone():
            modes = [module for module in model.modules() if module.training]
            try:
                for module in modes:
                    module.training = False
                with torch.no_grad(), model.disable_adapter():
                    return super().__call__(*args, **kwargs)
            finally:
                for module in modes:
                    module.training = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the base as it came, given its inputs (B, …)."""
        return self.__dict__["model"].base(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return getattr(self.__dict__["model"], name)
