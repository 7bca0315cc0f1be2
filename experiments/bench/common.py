"""What the benchmarks share: interleaved timing, and results as JSON with device, versions and commit."""

from __future__ import annotations

import json
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent.parent / "results"


def interleaved(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, dict[str, float]]:
    """Return name -> min, median and spread of process CPU seconds; every round runs each step once, in turn.

    One round sees all of them under the same load, so ratios are steadier than the times. Several threads need a clock
    of wall time: CPU time adds them up.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for round_ in range(warmup + rounds):
        draw.shuffle(order)  # none always meets the caches as the same neighbour left them
        for name in order:
            start = clock()
            steps[name]()
            if round_ >= warmup:
                times[name].append(clock() - start)
    return {
        name: {
            "min_s": min(values),
            "median_s": statistics.median(values),
            "spread_s": max(values) - min(values),
        }
        for name, values in times.items()
    }


def environment() -> dict[str, Any]:
    """Return device, versions and commit."""
    versions = {}
    for package in ("torch", "transformers", "peft", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "commit": commit or "unknown",
        **versions,
    }


def write(name: str, result: dict[str, Any], command: str) -> Path:
    """Write a result beside the others and return its path; `command` is what makes it again."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, "environment": environment(), **result}, indent=2) + "\n")
    return path
