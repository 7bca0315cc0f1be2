"""`LisaCallback`: LISA with the stock Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .lisa import Lisa, check_lisa


class LisaCallback(TrainerCallback):
    """Lets only some experts train at a time: `Trainer(..., callbacks=[LisaCallback(n_active=2, every=20)])`.

    Args:
        n_active: as all others, see `moa.training.lisa.Lisa`.
        every: optimizer steps in an interval.
        over: "layers" or "experts".
        state: "drop" or "keep".
        seed: of the choice.

    Raises:
        ConfigError: see `Lisa`; the model is not a `MoAModel`; several processes without
            ddp_find_unused_parameters, or parameters that are sharded.
    """

    def __init__(
        self, n_active: int = 2, every: int = 20, over: str = "layers", state: str = "keep", seed: int = 0
    ) -> None:
        check_lisa(n_active, every, over, state)
        self.options: dict[str, Any] = {"n_active": n_active, "every": every, "over": over, "state": state}
        self.options["seed"] = seed
        self.lisa: Lisa | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, at the step that Trainer has reached."""
        if args.fsdp or args.deepspeed:
            raise ConfigError("LISA freezes whole parameters, and these are sharded: leave out fsdp and deepspeed.")
        if args.world_size > 1 and not args.ddp_find_unused_parameters:
            raise ConfigError("LISA freezes parameters that other processes wait for: set ddp_find_unused_parameters.")
        model = next((m for m in kwargs["model"].modules() if isinstance(m, MoAModel)), None)
        if model is None:
            raise ConfigError(f"LISA found no MoAModel in {type(kwargs['model']).__name__}: make one with moa.build.")
        optimizer = kwargs["optimizer"]
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper passes no hooks on
        self.lisa = Lisa(model, inner, start_step=state.global_step, **self.options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let all train again."""
        if self.lisa is not None:
            self.lisa.close()
            self.lisa = None
