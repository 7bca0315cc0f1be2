"""`moa bench`: the benchmarks of a checkout."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys

from ..errors import ConfigError
from .shared_options import Command


def add(command: Command) -> None:
    """Add the command to a parser."""
    bench = command("bench", _bench, "run the benchmarks of a checkout")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="passed on to python -m experiments.bench")


def _bench(arguments: argparse.Namespace) -> None:
    """Run the benchmarks; they live in experiments/bench of a checkout, not in the installed package."""
    if importlib.util.find_spec("experiments") is None or importlib.util.find_spec("experiments.bench") is None:
        raise ConfigError("there is no experiments/bench here: run this from a checkout, which has them.")
    code = subprocess.call([sys.executable, "-m", "experiments.bench", *arguments.rest])
    if code:
        raise SystemExit(code)
