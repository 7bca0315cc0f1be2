"""Seconds that `import moa` takes beyond torch, in fresh interpreters, and what it leaves unimported."""

from __future__ import annotations

import json
import subprocess
import sys

from .common import write

COMMAND = "python -m experiments.bench.imports"
PROBE = """
import json, sys, time, torch
start = time.perf_counter()
import moa
heavy = [name for name in ("transformers", "triton", "megablocks", "matplotlib", "datasets") if name in sys.modules]
print(json.dumps([time.perf_counter() - start, heavy]))
"""


def seconds(runs: int = 5) -> tuple[float, list[str]]:
    """Return the least of several runs, and the heavy packages that were imported."""
    found = [
        json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout)
        for _ in range(runs)
    ]
    return min(time for time, _ in found), found[0][1]


def main() -> None:
    """Measure and write experiments/results/imports.json."""
    least, heavy = seconds()
    print(f"import moa: {least:.4f} s beyond torch; heavy packages imported: {heavy or 'none'}")
    print(write("imports", {"seconds_beyond_torch": least, "heavy": heavy}, COMMAND))


if __name__ == "__main__":
    main()
