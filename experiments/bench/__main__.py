"""Run the CPU benchmarks one after the other: `python -m experiments.bench [NAME …]`, all of them by default."""

from __future__ import annotations

import subprocess
import sys

NAMES = ("imports", "memory", "monitor", "kernels", "host", "step", "ddp")


def main() -> None:
    """Run the named benchmarks, each in a process of its own; each writes its JSON into experiments/results/."""
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.")
    failed = []
    for name in names:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"experiments.bench.{name}"], check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"these benchmarks failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
