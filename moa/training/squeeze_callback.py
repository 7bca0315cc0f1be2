"""`SqueezeCallback`: LoRA-Squeeze with the stock Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from .squeezing import check_begins_above, check_stages, current_rank, squeeze_experts, take_ranks


class SqueezeCallback(TrainerCallback):
    """Lowers the experts' rank in stages: `Trainer(..., callbacks=[SqueezeCallback(ranks=[16, 8], every=100)])`.

    After `every` optimizer steps the rank is the first, after as many again the second, and so on; when training ends
    it is the last, however early that is and whichever checkpoint was the best. Checkpoints hold the rank of their
    step, and a run goes on from any of them: from its making on, Trainer's model takes the rank of what it loads.

    Args:
        ranks: of the stages, falling; the model is built with a higher one.
        every: optimizer steps before each.

    Raises:
        ConfigError: see `check_stages` and `squeeze_experts`; the model is not a `MoAModel` or begins below the first
            rank; several processes.

    Source: LoRA-Squeeze, its form in training.
    """

    def __init__(self, ranks: Sequence[int], every: int) -> None:
        check_stages(ranks, every)
        self.ranks, self.every = tuple(ranks), every

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the model take the rank of a checkpoint that it goes on from."""
        _model_of(kwargs).register_load_state_dict_pre_hook(take_ranks)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what cannot be squeezed."""
        if args.fsdp or args.deepspeed or args.world_size > 1:
            raise ConfigError(
                "LoRA-Squeeze changes the sizes of parameters, which several processes, fsdp and deepspeed have fixed: "
                "train in one process, or squeeze afterwards with moa.training.squeezing.squeeze_experts."
            )
        if not state.global_step:
            check_begins_above(_model_of(kwargs), self.ranks)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeeze at the end of a stage."""
        stage = min(state.global_step // self.every, len(self.ranks))
        if stage:
            self._squeeze(self.ranks[stage - 1], kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Squeeze to the last rank."""
        self._squeeze(self.ranks[-1], kwargs)

    def _squeeze(self, rank: int, found: dict[str, Any]) -> None:
        model, optimizer = _model_of(found), found["optimizer"]
        if current_rank(model) > rank:
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
            squeeze_experts(model, rank, optimizer=inner)


def _model_of(found: dict[str, Any]) -> MoAModel:
    model = next((m for m in found["model"].modules() if isinstance(m, MoAModel)), None)
    if model is None:
        raise ConfigError(
            f"LoRA-Squeeze found no MoAModel in {type(found['model']).__name__}: make one with moa.build."
        )
    return model
