"""Gradient checkpointing of a base with mixtures inside: its blocks run a second time in backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ..errors import MoaWarning
from .host import Host
from .turns import alone


class Recomputed(Host):
    """What a `MoAModel` adds to its base's own gradient checkpointing: the mode in which routers learn."""

    @property
    def supports_gradient_checkpointing(self) -> bool:
        """Whether the base can checkpoint its blocks."""
        return bool(getattr(self._modules.get("base"), "supports_gradient_checkpointing", False))

    @alone
    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Checkpoint the base's blocks, as transformers does; non-reentrant unless asked otherwise.

        A router with a loss of its own learns from the first pass of each block, which the reentrant mode runs without
        gradients. With such a router the mode is non-reentrant also where the other one is asked for, with a warning:
        the gradients are those without checkpointing, and the memory that is saved is the same.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint`, e.g. {"use_reentrant": False}.
            kwargs: passed on to the base (every_n_layers, offload, where transformers has them).
        """
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            needy = [n for n, b in self.branches() if b.router.stochastic or b.router.loss_weights]
            if needy:
                options["use_reentrant"] = False
                warnings.warn(
                    f"reentrant gradient checkpointing cuts the gradient of the routers' own losses ({needy[0]}, …): "
                    "the non-reentrant mode is used in its place. Ask for it with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}, or build without such losses.",
                    MoaWarning,
                    stacklevel=2,
                )
        if options["use_reentrant"]:
            self.base.enable_input_require_grads()  # type: ignore[operator]
        self._newer_name("gradient_checkpointing_enable")(options, **kwargs)

    @alone
    def gradient_checkpointing_disable(self) -> None:
        """Stop checkpointing the base's blocks."""
        self._newer_name("gradient_checkpointing_disable")()

    @alone
    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Do what `gradient_checkpointing_enable` does; transformers 5.2x calls it by this name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    @alone
    def activation_checkpointing_disable(self) -> None:
        """Do what `gradient_checkpointing_disable` does."""
        self.gradient_checkpointing_disable()

    def _newer_name(self, method: str) -> Callable[..., None]:
        """Return the base's method under the name it has in newer transformers, which warn about the old one."""
        newer = method.replace("gradient", "activation")
        return getattr(self.base, newer if hasattr(self.base, newer) else method)  # type: ignore[no-any-return]

    @alone
    def enable_input_require_grads(self) -> None:
        """Make the output of the input embeddings, (B, S, d), require a gradient, as reentrant checkpointing needs."""
        self.base.enable_input_require_grads()  # type: ignore[operator]
