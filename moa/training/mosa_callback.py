"""`MoSACallback`: MoSA with the stock Trainer."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .mosa import MoSA, check_mosa, starts_of


class MoSACallback(TrainerCallback, ExportableState):
    """Trains experts as sparse copies that are one adapter: `Trainer(..., callbacks=[MoSACallback(n=4)])`.

    A run that goes on from a checkpoint needs the model as it was built at first, since the copies go on from where
    they started; what was another start is told by its sum.

    Args:
        n: as all others, see `moa.training.mosa.MoSA`.
        by: "entries", "rows" or "columns".
        shared_down: whether down is one for all copies.
        merge: "average" or "joint".
        consistency: weight of the divergence between two forwards.
        seed: of masks and draws.

    Raises:
        ConfigError: see `MoSA`; the model is not a `MoAModel`, is sharded, or started otherwise than the run's.
    """

    def __init__(
        self,
        n: int = 4,
        by: str = "entries",
        shared_down: bool = False,
        merge: str = "average",
        consistency: float = 1.0,
        seed: int = 0,
    ) -> None:
        check_mosa(n, by, merge, consistency)
        self.options: dict[str, Any] = {"n": n, "by": by, "shared_down": shared_down, "merge": merge}
        self.options |= {"consistency": consistency, "seed": seed}
        self.starts: dict[str, tuple[Tensor, Tensor]] | None = None
        self.mosa: MoSA | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the keywords, and the sum of all starts, ()."""
        return {"args": self.options, "attributes": {"start": self._sum()}}

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the experts as they start, before a checkpoint is read."""
        self.starts = starts_of(_model_of(kwargs))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, at the step that Trainer has reached."""
        if args.fsdp or args.deepspeed:
            raise ConfigError("MoSA splits whole factors, and these are sharded: leave out fsdp and deepspeed.")
        model = _model_of(kwargs)
        if self.starts is None:
            raise ConfigError("MoSA has to see the model as it starts: give it to Trainer in callbacks=[…].")
        if state.global_step:
            stored = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {}).get("start")
            if stored is None or not math.isclose(stored, self._sum(), rel_tol=1e-6):
                raise ConfigError(
                    "the copies of this run started as other experts than these: build the model as at first, with the "
                    "same seed, and let Trainer read the checkpoint."
                )
        model.steps_done = state.global_step
        self.mosa = MoSA(model, starts=self.starts, **self.options)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the merged experts."""
        if self.mosa is not None:
            self.mosa.close()
            self.mosa = None

    def _sum(self) -> float:
        return sum(float(tensor.double().sum()) for pair in (self.starts or {}).values() for tensor in pair)


def _model_of(found: dict[str, Any]) -> MoAModel:
    model = next((m for m in found["model"].modules() if isinstance(m, MoAModel)), None)
    if model is None:
        raise ConfigError(f"MoSA found no MoAModel in {type(found['model']).__name__}: make one with moa.build.")
    return model
