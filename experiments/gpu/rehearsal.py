"""The whole rehearsal: every row at toy sizes, every kernel compiled for a Hopper GPU. An error where one fails.

`python -m experiments.gpu.rehearsal --out FOLDER`; `make gpu-rehearsal` runs it on both sets of versions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from . import __main__ as command
from .book import Book
from .warm import warm

EXPECTED = {"failures"}  # the section whose rows are there to fail


def failures(book: Book) -> list[str]:
    """Return what went wrong in a rehearsal."""
    found = []
    for section, rows in book.content["sections"].items():
        for name, row in rows.items():
            if section not in EXPECTED and ("error" in row or not (row["found"] or {}).get("holds", True)):
                found.append(f"{section}, {name}: {row.get('error') or row['found']}")
    left = book.content.get("left over", {})
    found += [f"{section}: {len(names)} rows had no time" for section, names in left.items() if names]
    return [line for line in found if line.split(":")[0] not in EXPECTED]


def main() -> None:
    """Rehearse, and say what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rehearsal"))
    parser.add_argument("--seconds", type=float, default=3600.0, help="for each of the two halves")
    parser.add_argument("--arch", type=int, default=90, help="what kernels are compiled for: 90 is a Hopper GPU")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    command.main(["--out", str(options.out), "--rehearse", "whole", "--seconds", str(options.seconds)])
    found = failures(Book(options.out / "gpu.json"))
    compiled = warm(options.arch, len(os.sched_getaffinity(0)), seconds=options.seconds, report=True)
    (options.out / "compiled.json").write_text(json.dumps(compiled, indent=1) + "\n")
    print(f"{compiled['kernels']} kernels compiled for sm_{options.arch}", *compiled["notes"], sep="\n- ")
    found += [f"{failed.get('job', '')}: {failed['error']}" for failed in compiled["failed"]]
    found += [f"{compiled['late processes']} compiling processes had no time"] if compiled["late processes"] else []
    sys.exit("\n".join(["the rehearsal failed:", *found]) if found else 0)


if __name__ == "__main__":
    main()
