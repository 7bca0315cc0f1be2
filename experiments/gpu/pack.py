"""Compile every kernel of the call here, and pack them for a machine with the same triton and Python packages.

`python -m experiments.gpu.pack FILE` on a CPU, with the versions of `machine.txt`; then `python -m experiments.gpu
--cache FILE` on the GPU. Triton knows a kernel by its source, its sizes and triton's own files: where those differ the
kernels are compiled there, as without it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from .warm import warm


def pack(folder: Path, file: Path) -> int:
    """Write what a cache holds into one file, and return its bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz", compresslevel=6) as packed:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                packed.add(path, path.relative_to(folder))
    return file.stat().st_size


def main() -> None:
    """Compile and pack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--folder", type=Path, help="a cache to begin with; a new one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        os.environ["TRITON_CACHE_DIR"] = str(folder)
        found = warm(options.arch, len(os.sched_getaffinity(0)), seconds=7200)
        print(f"{found['kernels']} kernels, {pack(folder, options.file) / 2**20:.1f} MiB: {options.file}")
    if found["failed"]:
        sys.exit("\n".join(str(failed) for failed in found["failed"]))


if __name__ == "__main__":
    main()
