"""One of several processes that run moa's commands one after the other, and leaves what each said and returned.

`torchrun -m tests.parallel.commands FOLDER`, with the commands in FOLDER/commands.json, see `test_train.py`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from moa.cli.main import main
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


def run(folder: Path) -> None:
    """Run the commands; the last one's exit code is the process's, and its words go where they go."""
    commands = json.loads((folder / "commands.json").read_text())
    found = []
    for number, (words, fault) in enumerate(commands):
        said = io.StringIO()
        last = number == len(commands) - 1
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(sys.stderr if last else said):
            if fault:
                train_with(patch, Fault(*fault))
            code = main(words)
        if last:
            sys.exit(code)
        found.append({"code": code, "said": said.getvalue()})
        (folder / f"said-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run(Path(sys.argv[1]))
