"""`QuantisationAwareCallback`: experts trained on integers, with the stock Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .quantisation_aware import learn_scales, run_on_integers, settle_scales


class QuantisationAwareCallback(TrainerCallback):
    """Trains on the integers to be deployed: `Trainer(..., callbacks=[QuantisationAwareCallback(bits=4)])`.

    From then on the model runs on them, after training, too: what is scored is what `deployed(model, bits)` gives. Give
    Trainer `optimizers=(AdamW(scaled_groups(model, lr)), None)` for the learning rates that follow from the scales.

    Args:
        bits: of a code, 2 to 8.
        learned: the scales are trained, too; Trainer's own checkpoints hold them, `write_scales` keeps them afterwards.

    Raises:
        ConfigError: see `quantisation_aware`; the model is not a `MoAModel`.
    """

    def __init__(self, bits: int = 4, learned: bool = True) -> None:
        self.bits, self.learned = bits, learned

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make parameters of the scales, before an optimizer is made and a checkpoint is read."""
        if self.learned:
            learn_scales(_model_of(kwargs), self.bits)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run on integers."""
        run_on_integers(_model_of(kwargs), self.bits)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the scales be what they are."""
        settle_scales(_model_of(kwargs))


def _model_of(found: dict[str, Any]) -> MoAModel:
    model = next((m for m in found["model"].modules() if isinstance(m, MoAModel)), None)
    if model is None:
        raise ConfigError(f"there is no MoAModel in {type(found['model']).__name__}: make one with moa.build.")
    return model
