"""Routers whose numbers are not finite: found where a forward begins that no loss will judge."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from ..errors import NumericsError
from ..formats.sharded import is_sharded
from ..offload import check_trainable
from ..types import Context
from .stepping import Stepped


class Sound(Stepped):
    """A model that looks at its routers' tensors before it is used, once for each time that they have changed.

    A router with NaN chooses experts all the same, and what comes out may be finite. In training the loss says so.
    """

    _router_tensors: list[tuple[str, Tensor]] | None = None
    _sound_at: int | None = None  # how often those had been written when they were found to be finite

    def named_routers(self) -> list[tuple[str, nn.Module]]:
        """Return the routers, of weights (E, i) and the like, by the name of their layer."""
        raise NotImplementedError

    def check_routers(self, context: Context) -> None:
        """Check that the routers' tensors (any shape) are finite, if a forward in this context uses them.

        One wait for the device after each change, none while nothing changes: PyTorch counts what is written in place.
        A model that is sharded over processes is not looked at: its tensors come and go.

        Raises:
            NumericsError: one is not; its layer is named.
        """
        if not context.enabled or context.pinned is not None or (self.training and torch.is_grad_enabled()):
            return
        if self._router_tensors is None:
            sharded = any(is_sharded(p) or hasattr(m, "unshard") for m in self.modules() for p in m.parameters(False))
            self._router_tensors = [
                (f"router of {name}: {key}", tensor)
                for name, router in self.named_routers()
                for key, tensor in router.state_dict(keep_vars=True).items()
                if tensor.is_floating_point() and not sharded
            ]
        written = sum(tensor._version for _, tensor in self._router_tensors if not tensor.is_inference())
        if written != self._sound_at:
            check_finite(self._router_tensors)
            self._sound_at = written

    def routers_changed(self) -> None:
        """Look anew at the routers, of weights (E, i) and the like."""
        self._router_tensors = self._sound_at = None

    def train(self, mode: bool = True) -> Self:
        """Set training mode as every module does, and look at the routers anew, of weights (E, i) and the like.

        Raises:
            ConfigError: what is trained has been offloaded.
        """
        if mode:
            check_trainable(self)
        self._router_tensors = self._sound_at = None
        return super().train(mode)


@torch.no_grad()
def check_finite(tensors: list[tuple[str, Tensor]]) -> None:
    """Check that tensors of any shape are finite, with one wait for each device.

    Raises:
        NumericsError: one is not; the first is named.
    """
    sums: dict[torch.device, list[Tensor]] = {}
    for _, tensor in tensors:
        if not tensor.is_meta:
            sums.setdefault(tensor.device, []).append(tensor.detach().float().sum())
    if all(bool(torch.stack(values).isfinite().all()) for values in sums.values()):
        return
    for name, tensor in tensors:  # a sum may be infinite where no summand is
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"the {name} holds NaN or infinity: it would choose experts at random. Training diverged; go on from "
                "an earlier checkpoint."
            )
