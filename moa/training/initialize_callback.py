"""`InitializeCallback`: `moa.initialize` with the stock Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .initialize import initialize
from .originals import Original
from .start_options import check_start


class InitializeCallback(TrainerCallback):
    """Starts fresh experts from the first training batches: `Trainer(..., callbacks=[InitializeCallback("eva")])`.

    A run that goes on from a checkpoint is left as it is.

    Args:
        method: as all others, see `moa.initialize`.
        batches: of each process.
        lr: of the first step, for "lora-sb".
        original: the weights before they were quantised, for "qwha".

    Attributes:
        shares: layer -> what its start holds, after it.

    Raises:
        ConfigError: see `moa.initialize`; the model is not a `MoAModel`, or is sharded.
    """

    def __init__(
        self, method: str = "lora-sb", batches: int = 8, lr: float | None = None, original: Original | None = None
    ) -> None:
        check_start(method, batches, lr, original)
        self.method, self.batches, self.lr, self.original = method, batches, lr, original
        self.shares: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the experts, unless Trainer has taken a step already."""
        if state.global_step:
            return
        if args.fsdp or args.deepspeed:
            raise ConfigError(
                f"{self.method!r} starts whole parameters, and these are sharded: call moa.initialize before."
            )
        model = next((m for m in kwargs["model"].modules() if isinstance(m, MoAModel)), None)
        if model is None:
            raise ConfigError(f"there is no MoAModel in {type(kwargs['model']).__name__}: make one with moa.build.")
        data = kwargs["train_dataloader"]
        self.shares = initialize(model, data, self.method, batches=self.batches, lr=self.lr, original=self.original)
