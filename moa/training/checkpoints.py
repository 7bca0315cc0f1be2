"""Trainer's checkpoints of a run, of which the newest may have been cut off by a kill."""

from __future__ import annotations

import zipfile
from pathlib import Path

from ..errors import CheckpointError
from ..formats.headers import read_header
from ..formats.json_files import read_json

MARKER = "trainer_state.json"  # Trainer writes it last
LATEST = "latest"  # DeepSpeed's


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint-N below a folder that Trainer finished writing, or None; no tensor is read.

    With the stock Trainer, a run that was killed at any moment goes on with::

        newest = newest_checkpoint(args.output_dir)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)

    Trainer itself takes the one with the largest number, and fails where that was cut off.

    Args:
        output_dir: of the run.
    """
    return next((found for found in reversed(checkpoints(Path(output_dir))) if is_whole(found)), None)


def checkpoints(folder: Path) -> list[Path]:
    """Return a run's checkpoint folders in the order of their steps, whole or not; no tensors."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=number)


def number(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has all that resuming needs, each file as long as it should be; no tensor is read."""
    try:
        if read_json(checkpoint / MARKER).get("global_step") != number(checkpoint):
            return False
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            read_header(file)
    except CheckpointError:
        return False
    draws = list(checkpoint.glob("rng_state*.pth"))
    archives = [*_optimizer_files(checkpoint), *draws]
    return bool(weights) and bool(draws) and all(zipfile.is_zipfile(file) for file in archives)


def parts_of_engine(checkpoint: Path) -> list[Path]:
    """Return the files in which DeepSpeed's processes have saved their part of the optimizer's state, none without it.

    Args:
        checkpoint: folder, in which the file `latest`, written last, names the one of the parts; no tensor is read.
    """
    latest = checkpoint / LATEST
    name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    return sorted((checkpoint / name).glob("*optim_states.pt")) if name and name == Path(name).name else []


def _optimizer_files(checkpoint: Path) -> list[Path]:
    """Return what must be there and whole for the optimizer to go on."""
    parts = parts_of_engine(checkpoint)
    return (
        [*parts, *parts[0].parent.glob("*model_states.pt")]
        if parts
        else [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    )
