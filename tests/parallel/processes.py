"""Starts a few processes of one job on this machine and waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 400  # seconds


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process that finds this repository first, with one thread."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **quiet, **more}


def run_together(job: str, n: int, *arguments: str, python: str | Path | None = None, **more: str) -> None:
    """Run `main(rank, n, *arguments)` of a job, a module, in n processes, and fail with what they say if one fails.

    The Python of another environment has another engine's packages, whose warnings are their own. `more` is for the
    processes' environment.
    """
    strides = "ignore:Grad strides do not match bucket view strides"  # DDP's, of gradients with an axis of size 1
    strict = ["-W", "error", "-W", "ignore::DeprecationWarning", "-W", strides]
    start = [sys.executable, *strict] if python is None else [str(python)]
    command = [*start, "-m", "tests.parallel.fork", job, str(n), *arguments]
    with subprocess.Popen(
        command, env=environment(**more), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            _, said = started.communicate(timeout=PATIENCE)
        finally:
            if started.returncode is None:
                os.killpg(started.pid, signal.SIGKILL)  # its children, too, which wait for each other
    assert started.returncode == 0, said[-6000:]
