"""Trainer's checkpoints of a run, of which the newest may have been cut off by a kill."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..formats.headers import read_header
from ..formats.json_files import read_json
from ..formats.pickled_words import pickled_words

MARKER = "trainer_state.json"  # the first process writes it after its other files, whatever the others have written
LATEST = "latest"  # DeepSpeed's
ARGUMENTS = "training_args.bin"
OF_PROCESS = re.compile(r"(zero_pp_rank_)\d+_")  # in the names of DeepSpeed's files
DRAWS = "rng_state.pth"  # of one process; of several, each has its own


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint-N below a folder that Trainer finished writing, or None; no tensor is read.

    With the stock Trainer, a run that was killed at any moment goes on with::

        newest = newest_checkpoint(args.output_dir)
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)

    Trainer itself takes the one with the largest number, and fails where that was cut off. Of several processes each
    writes a part, and a checkpoint counts only if all have: the first one's last file says nothing of the others'. One
    that was written by more or fewer processes than go on with it counts, too: Trainer restores weights, optimizer and
    schedule, and draws random numbers anew; see `processes_of`.

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


def processes_of(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint; nothing in its files is run, and no tensor is read.

    Trainer's arguments say so. Where they are gone, or are of a Trainer that does not say it, the names of the files
    do: one process's file is rng_state.pth, and of several there are two at least.

    Raises:
        CheckpointError: the arguments are there and damaged.
    """
    said = _said(checkpoint, "accelerate.state PartialState", "num_processes")
    if isinstance(said, int) and said > 0:
        return said
    if (checkpoint / DRAWS).is_file():
        return 1
    ranks = [path.stem.removeprefix("rng_state_") for path in checkpoint.glob("rng_state_*.pth")]
    return max([2, *(int(rank) + 1 for rank in ranks if rank.isdecimal())])


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint has all that resuming needs, of every process that wrote it; no tensor is read.

    Each file is as long as it should be. Under `save_on_each_node` a machine has the files of its own processes.
    """
    try:
        if read_json(checkpoint / MARKER).get("global_step") != number(checkpoint):
            return False
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:
            read_header(file)
        n, apart = processes_of(checkpoint), _said(checkpoint, "save_on_each_node") is True
    except CheckpointError:
        return False
    draws = list(checkpoint.glob("rng_state*.pth"))
    if not weights or len(draws) < (1 if apart else n):
        return False
    if not apart:
        draws = [checkpoint / (DRAWS if n == 1 else f"rng_state_{rank}.pth") for rank in range(n)]
    return all(zipfile.is_zipfile(file) for file in (*draws, *_of_optimizer(checkpoint, n)))


def _said(checkpoint: Path, *names: str) -> Any:
    """Return what follows names, one after the other, in the arguments that Trainer saved; None where it is not there.

    Raises:
        CheckpointError: they are damaged.
    """
    words = iter(pickled_words(checkpoint / ARGUMENTS) if (checkpoint / ARGUMENTS).is_file() else [])
    return next(words, None) if all(name in words for name in names) else None


def parts_of_engine(checkpoint: Path) -> list[Path]:
    """Return the files in which DeepSpeed's processes have saved their part of the optimizer's state, none without it.

    Args:
        checkpoint: folder, in which the file `latest` names the one of the parts; no tensor is read.
    """
    folder = _of_engine(checkpoint)
    return [] if folder is None else sorted(folder.glob("*optim_states.pt"))


def _of_engine(checkpoint: Path) -> Path | None:
    """Return the folder of DeepSpeed's own files, None without it."""
    latest = checkpoint / LATEST
    name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    return checkpoint / name if name and name == Path(name).name else None


def _of_optimizer(checkpoint: Path, n: int) -> set[Path]:
    """Return what must be there and whole for the optimizer of n processes to go on."""
    folder = _of_engine(checkpoint)
    if folder is None:
        return {checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"}
    models = list(folder.glob("*model_states.pt")) or [folder / "mp_rank_00_model_states.pt"]
    found = [*parts_of_engine(checkpoint), *models]
    # a file whose name has a process's number is there of each: of ZeRO's two kinds or, without ZeRO, of neither
    return {file.with_name(OF_PROCESS.sub(rf"\g<1>{rank}_", file.name)) for file in found for rank in range(n)}
