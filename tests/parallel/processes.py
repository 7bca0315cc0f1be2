"""Starts a few processes of one job on this machine and waits for them."""

from __future__ import annotations

import os
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


def run_together(module: str, n: int, *arguments: str) -> None:
    """Run `python -m module RANK N arguments…` for every rank, and fail with the words of the first that fails."""
    strides = "ignore:Grad strides do not match bucket view strides"  # DDP's, of gradients with an axis of size 1
    start = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-W", strides, "-m", module]
    jobs = [
        subprocess.Popen([*start, str(rank), str(n), *arguments], env=environment(), stderr=subprocess.PIPE, text=True)
        for rank in range(n)
    ]
    said = []
    try:
        for job in jobs:
            said.append(job.communicate(timeout=PATIENCE)[1])
    finally:
        for job in jobs:
            job.kill()
    wrong = [text for job, text in zip(jobs, said, strict=True) if job.returncode]
    assert not wrong, "\n".join(text[-3000:] for text in wrong)
