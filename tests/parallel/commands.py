"""One of several processes that run moa's commands one after the other, and leaves what each said and returned.

`torchrun -m tests.parallel.commands FOLDER`, with the commands in FOLDER/commands.json, see `test_train.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from moa.cli.main import main
from moa.errors import CheckpointError
from moa.formats.json_files import read_json
from moa.training.checkpoints import MARKER
from tests.tiny_run import train_with


class Fault(TrainerCallback):
    """Raises after a step: Ctrl-C in every process, or another error in the last one only."""

    def __init__(self, step: int, kind: str) -> None:
        self.step, self.kind = step, kind

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise."""
        if state.global_step == self.step and self.kind == "ctrl-c":
            raise KeyboardInterrupt
        if state.global_step == self.step and not state.is_world_process_zero:
            raise MemoryError("made by the test")


def kill_between_writes(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let the second process be killed before its last file of a checkpoint, when the first one has written all its."""
    save = Trainer._save_rng_state

    def killed(self: Trainer, output_dir: str) -> None:
        if self.args.process_index == 1 and self.state.global_step == step:
            while not is_there(Path(output_dir) / MARKER):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, output_dir)

    patch.setattr(Trainer, "_save_rng_state", killed)


def is_there(file: Path) -> bool:
    """Tell whether a JSON file is written to its end."""
    try:
        return bool(read_json(file))
    except CheckpointError:
        return False


def run(folder: Path) -> None:
    """Run the commands; the last one's exit code is the process's, and its words go where they go."""
    commands = json.loads((folder / "commands.json").read_text())
    found = []
    for number, (words, fault) in enumerate(commands):
        said = io.StringIO()
        last = number == len(commands) - 1
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(sys.stderr if last else said):
            if fault and fault[1] == "kill":
                kill_between_writes(patch, fault[0])
            elif fault:
                train_with(patch, Fault(*fault))
            code = main(words)
        if last:
            sys.exit(code)
        found.append({"code": code, "said": said.getvalue()})
        (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
