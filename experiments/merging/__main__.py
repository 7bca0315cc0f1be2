"""`python -m experiments.merging`: train, merge, score, write merging.json and merging.png; a second call goes on.

Needs what `moa demo` fetches. About 40 minutes of one core; several calls with different --seeds may share --work.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import warnings
from pathlib import Path

from experiments.bench.common import RESULTS, write
from moa.runs.demo import cache_folder

from .run import Log, Settings, run
from .summary import figure, summarise, table

COMMAND = "python -m experiments.merging"


def main() -> None:
    """Run the experiment and keep its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="what `moa demo` filled")
    parser.add_argument("--work", type=Path, default=Path("runs/merging"), help="folder of what is done already")
    parser.add_argument("--name", default="merging", help="of the result files")
    parser.add_argument("--report", action="store_true", help="train nothing, write what is done so far")
    for field in dataclasses.fields(Settings):
        default = field.default
        many = isinstance(default, tuple)
        kind = type(default[0]) if isinstance(default, tuple) else type(default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=kind, nargs="+" if many else None, default=default
        )
    options = vars(parser.parse_args())
    cache, work, name = (options.pop(key) for key in ("cache", "work", "name"))
    report = options.pop("report")
    settings = Settings(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    log = Log(work / "rows.jsonl", settings)
    rows = log.rows() if report else run(settings, str(cache / "all-MiniLM-L6-v2"), cache, log)
    summary = summarise(rows)
    print(table(summary))
    result = {
        "settings": dataclasses.asdict(settings),
        "cpu_s": sum(row["cpu_s"] for row in rows),
        "summary": summary,
        "rows": rows,
    }
    print("written to", write(name, result, COMMAND), "and", figure(summary, RESULTS / f"{name}.png"))


if __name__ == "__main__":
    main()
