"""Processes that are ended with all that they started: a tool's program outlives the tool that is killed."""

from __future__ import annotations

import contextlib
import subprocess
from typing import Any

import psutil  # comes with accelerate and peft


def end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and every process below it, which stay in this one's group so that whoever ends it ends them."""
    below: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for one in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
