"""Run the CPU benchmarks one after the other: `python -m experiments.bench [NAME …]`, all of them by default."""

from __future__ import annotations

import runpy
import sys

NAMES = ("imports", "memory", "monitor", "kernels", "host", "step")


def main() -> None:
    """Run the named benchmarks; each writes its JSON into experiments/results/."""
    names = sys.argv[1:] or list(NAMES)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        sys.exit(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}.")
    for name in names:
        print(f"== {name}", flush=True)
        sys.argv = [name]
        runpy.run_module(f"experiments.bench.{name}", run_name="__main__")


if __name__ == "__main__":
    main()
