"""Damaged files into every reader. python -m tests.fuzz --inputs 30000 --out experiments/results/fuzz.json"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from experiments.bench.common import environment
from tests.fuzz.harness import fuzz
from tests.fuzz.surfaces import SURFACES


def main() -> None:
    """Run, print and keep the counts."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--inputs", type=int, default=30_000, help="in all")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--only", default="", help="part of a surface's name")
    words.add_argument("--out", type=Path)
    arguments = words.parse_args()
    chosen = [name for name in SURFACES if arguments.only in name]
    counts, found = {}, {}
    for name in chosen:
        counts[name], others = fuzz(name, -(-arguments.inputs // len(chosen)), arguments.seed)
        found |= others
        print(name, counts[name], flush=True)
    totals = {key: sum(row[key] for row in counts.values()) for key in next(iter(counts.values()))}
    totals["most_megabytes"] = max(row["most_megabytes"] for row in counts.values())
    for what, where in list(found.items())[:60]:
        print(f"{where}: {what}")
    print(totals)
    if arguments.out is not None:
        command = f"python -m tests.fuzz --inputs {arguments.inputs} --seed {arguments.seed}"
        kept = {"command": command, "environment": environment(), "totals": totals, "surfaces": counts}
        text = json.dumps(kept, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(totals["other"] or totals["hangs"]))


if __name__ == "__main__":
    main()
