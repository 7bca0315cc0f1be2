"""The demo's comparison, kept: `python -m experiments.demo_comparison` writes what `moa demo` prints as a result."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.bench.common import write
from moa.runs import demo
from moa.runs.comparison_report import compare, comparison_text


def main() -> None:
    """Write experiments/results/demo.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=demo.cache_folder(), help="what `moa demo --prepare` filled")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    results = compare(options.cache, options.seeds, workers=2)
    write("demo", results, f"python -m experiments.demo_comparison --seeds {options.seeds}")
    print(comparison_text(results))


if __name__ == "__main__":
    main()
