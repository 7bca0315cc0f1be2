"""python -m experiments.cross_domain MODEL DATA [--target toys] [--seeds 0 1 2] …: one table, one JSON file.

MODEL is a folder or hub id of an encoder (all-MiniLM-L6-v2 in the kept result, in place of the paper's DeBERTa-v3),
DATA the folder with the five domains. Item vectors and source adapters are made once; then each method's learning rates
are chosen by validation users, from grids of one size; then one model is trained per method, number of users and seed.

A run that was cut goes on where it was: everything made is under --folder, apart for other settings.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from experiments.bench.common import write

from .bench import Settings
from .data import DOMAINS
from .run import run, summary

CHOICES = {"sources": DOMAINS, "target": DOMAINS, "methods": Settings.methods}


def main() -> None:
    """Run the experiment and keep its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--folder", type=Path, default=Path("runs/cross_domain"), help="keeps what a run has made")
    parser.add_argument("--name", default="cross_domain", help="of the result file")
    for field in dataclasses.fields(Settings):
        if field.name in ("model", "data"):
            continue
        default = field.default
        several = isinstance(default, tuple)
        kind = type(default[0] if isinstance(default, tuple) else default)
        choices = CHOICES.get(field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if several:
            parser.add_argument(flag, nargs="+", type=kind, default=default, choices=choices)
        else:
            parser.add_argument(flag, type=kind, default=default, choices=choices)
    options = vars(parser.parse_args())
    name, folder = options.pop("name"), options.pop("folder")
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    result = run(settings, folder, lambda line: print(line, flush=True))
    result["settings"]["model"] = settings.model.rstrip("/").rsplit("/", 1)[-1]
    result["settings"]["data"] = settings.data.rstrip("/").rsplit("/", 1)[-1]
    print(summary(result))
    print("written to", write(name, result, "python -m experiments.cross_domain MODEL DATA"))


if __name__ == "__main__":
    main()
