"""python -m experiments.cross_domain MODEL DATA [--target toys] [--seeds 0 1 2] …: one table, one JSON file.

MODEL is a folder or hub id of an encoder (all-MiniLM-L6-v2 in the kept result, in place of the paper's DeBERTa-v3),
DATA the folder with the five domains. Item texts and source adapters are made once, then
one model per method, number of users and seed.
"""

from __future__ import annotations

import argparse

from experiments.bench.common import write

from .data import DOMAINS
from .run import Settings, run, summary


def main() -> None:
    """Run the experiment and keep its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--target", choices=DOMAINS, default="toys")
    parser.add_argument("--sources", nargs="+", choices=DOMAINS, default=["office", "industrial", "food"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[50, 100, 500, 1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--name", default="cross_domain", help="of the result file")
    for field, kind in (
        ("source_users", int),
        ("n_test", int),
        ("length", int),
        ("passes", int),
        ("source_passes", int),
        ("max_epochs", int),
        ("lr_lora", float),
        ("lr_streams", float),
        ("lr_head", float),
    ):
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, default=getattr(Settings, field))
    options = vars(parser.parse_args())
    name = options.pop("name")
    settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    result = run(settings)
    result["settings"]["model"] = settings.model.rstrip("/").rsplit("/", 1)[-1]
    result["settings"]["data"] = settings.data.rstrip("/").rsplit("/", 1)[-1]
    print(summary(result))
    print("written to", write(name, result, "python -m experiments.cross_domain MODEL DATA"))


if __name__ == "__main__":
    main()
