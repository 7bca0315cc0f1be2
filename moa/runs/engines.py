"""A run by DeepSpeed: its plan, what ZeRO-3 cannot do in a run, and one engine at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from ..formats.json_files import read_json
from ..training.checkpoints import parts_of_engine, processes_of

if TYPE_CHECKING:
    from transformers import Trainer


def stage_of(training: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of the `training:` section, 0 without DeepSpeed.

    Raises:
        ConfigError: its plan is a file without JSON in it, or one whose stage is not a number.
    """
    plan = training.get("deepspeed")
    if not plan:
        return 0
    try:
        found: Any = plan if isinstance(plan, Mapping) else read_json(Path(plan))
    except CheckpointError as error:
        raise ConfigError(f"training.deepspeed: {error}") from error
    zero = found.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, Mapping) else None
    if not isinstance(stage, int):
        raise ConfigError(f"training.deepspeed: zero_optimization.stage must be a number from 0 to 3, got {stage!r}.")
    return stage


def check_engine(training: Mapping[str, Any], after: Mapping[str, Any], checkpoint: Path | None, world: int) -> None:
    """Check that DeepSpeed can do what a run asks for.

    Args:
        training: section of the configuration.
        after: keys of the configuration whose work follows the training, by a whole model in each process.
        checkpoint: that the run goes on from.
        world: processes of this run.

    Raises:
        ConfigError: a key whose work needs a whole model under ZeRO-3; a checkpoint of another number of processes.
    """
    stage = stage_of(training)
    asked = next((key for key, value in after.items() if value is not None), None)
    if stage == 3 and asked is not None:
        raise ConfigError(
            f"{asked}: ZeRO-3 spreads the model over the processes, and that works with a whole one. Leave {asked} "
            "out, or take ZeRO-2."
        )
    saved = 0 if checkpoint is None or not parts_of_engine(checkpoint) else processes_of(checkpoint)
    if saved and saved != world:
        raise ConfigError(
            f"{checkpoint} was written by {saved} processes, each its part of DeepSpeed's state, and here are {world}: "
            f"go on with {saved}."
        )


def make_room() -> None:
    """Let accelerate take a plan of DeepSpeed: it takes one for each process's life, and a run has several trainers."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()


def score_whole(trainer: Trainer) -> None:
    """Let a trainer that only scores do without DeepSpeed where each process has the whole model: it refuses there."""
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage < 3:
        trainer.is_deepspeed_enabled = False


def let_go(trainer: Trainer) -> None:
    """Take a trainer's engine off its model, whose next trainer has its own."""
    engine: Any = trainer.deepspeed
    if engine is not None:
        engine.destroy()
