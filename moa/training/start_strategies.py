"""The strategies that are starts from data: `moa.initialize` before the first step, then Trainer's own way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import ConfigError
from ..tables import check_numbers
from .start_options import check_start
from .strategy import Strategy, register_strategy

if TYPE_CHECKING:
    from ..model.moa_model import MoAModel


@dataclass(frozen=True, kw_only=True)
class Start(Strategy):
    """A start by a method of `moa.initialize`.

    Args:
        batches: of training rows that are looked at, in each process.
    """

    method: ClassVar[str] = ""

    batches: int = 8

    def __post_init__(self) -> None:
        check_numbers(self)
        check_start(self.method, self.batches, **self.options())

    def options(self) -> dict[str, Any]:
        """Return the method's own keywords, plain values."""
        return {}

    def check(self, model: MoAModel) -> None:
        """Refuse experts that do not start so, of any shape."""
        from .fresh import fresh_layers

        fresh_layers(model, self.method)

    def callbacks(self) -> list[Any]:
        """Return one fresh `InitializeCallback`."""
        from .initialize_callback import InitializeCallback

        return [InitializeCallback(self.method, self.batches, **self.options())]


@register_strategy("lora-sb")
@dataclass(frozen=True, kw_only=True)
class LoRASBStrategy(Start):
    """Cores that start at the first step of their weight.

    Args:
        lr: of the first step.
    """

    method = "lora-sb"

    lr: float = 1e-5

    def options(self) -> dict[str, Any]:
        """Return lr."""
        return {"lr": self.lr}


@register_strategy("eva")
@dataclass(frozen=True, kw_only=True)
class EvaStrategy(Start):
    """LoRAs that start at the principal components of their inputs."""

    method = "eva"


@register_strategy("qwha")
@dataclass(frozen=True, kw_only=True)
class QWHAStrategy(Start):
    """Walsh-Hadamard coefficients that start at what quantising the base lost.

    Args:
        original: folder or file of safetensors of the model that the base was quantised from.
    """

    method = "qwha"

    original: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not os.path.exists(self.original):
            raise ConfigError(
                f"original: {self.original} does not exist: it is the folder of the base before it was quantised."
            )

    def options(self) -> dict[str, Any]:
        """Return original."""
        return {"original": self.original or None}

    def check(self, model: MoAModel) -> None:
        """Refuse experts that do not start so, of any shape, and layers whose original weights are not there."""
        from .fresh import fresh_layers
        from .originals import Originals

        held = Originals(self.original)
        for name in fresh_layers(model, self.method):
            held.key(name)
