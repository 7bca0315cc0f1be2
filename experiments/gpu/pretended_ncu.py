"""An ncu that is not there, for a rehearsal: it runs the program it is given and prints a page in ncu's format.

`python -m experiments.gpu.pretended_ncu --way WAY …`, where … is what ncu would be given.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import ncu

# Way -> what is said of it; the last is counted all the same.
WAYS = {
    "is not there": "is not here",
    "may not read": "ERR_NVGPUCTRPERM",
    "takes too long": "it was killed after",
    "knows no counter": "Failed to find metric",
    "lacks one counter": "not there: sm__pipe_tensor_cycles_active",
}
DENIED = (
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters on the "
    "target device 0."
)
# The launches of `counters.py`, in their order, as ncu names them.
LAUNCHES = (
    "shrink_kernel",
    "routed_shrink_kernel",
    "expand_kernel",
    "unmix_kernel",
    "gram_kernel",
    "add_splits_kernel",
    "partial_shrink_kernel",
    "gated_expand_kernel",
    "grouped_shrink_kernel",
    "grouped_expand_kernel",
    "combine_kernel",
    "grouped_gram_kernel",
    "add_chunks_kernel",
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT",
)
HEADER = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size")
HEADER += ("Grid Size", "Device", "CC")
FIGURES = {  # unit and value of one launch; the next ones take longer
    "seconds": ("us", 41.25),
    "bytes read": ("Mbyte", 67.5),
    "bytes written": ("byte", 2_097_152.0),
    "registers": ("register/thread", 168.0),
    "shared bytes": ("Kbyte/block", 98.304),
    "waves": ("", 0.97),
    "wgmma": ("inst", 8_192.0),
}


def command(way: str) -> list[str]:
    """Return the command of a stand-in that is well, or fails in a way."""
    if way == "is not there":
        return ["ncu-that-is-not-there"]
    return [sys.executable, "-m", "experiments.gpu.pretended_ncu", "--way", way]


def tried(way: str, seconds: float = 60.0) -> dict[str, Any]:
    """Return whether a way to fail is said, of a program that does nothing."""
    program = [sys.executable, "-c", "print('it ran')"]
    try:
        _, missing = ncu.profile(command(way), program, 2.0 if way == "takes too long" else seconds)
        said = f"not there: {', '.join(missing)}"
    except ncu.NotCounted as error:
        said = str(error)
    return {"holds": WAYS[way] in said, "said": said}


def page(metrics: list[str]) -> list[list[str]]:
    """Return a header, a line of units, and a line for each launch, as on ncu's raw page."""
    labels = {name: label for label, names in ncu.METRICS.items() for name in names}
    figures = [FIGURES.get(labels[name], ("%", 12.5)) for name in metrics]
    lines = [[*HEADER, *metrics], ["" for _ in HEADER] + [unit for unit, _ in figures]]
    for n, kernel in enumerate(LAUNCHES):
        of = [str(n), "4711", "python3", "127.0.0.1", kernel, "1", "7", "(128, 1, 1)", "(128, 1, 1)", "0", "9.0"]
        values = [f"{value + n:,.2f}" if unit == "us" else f"{value:,.3f}" for unit, value in figures]
        lines.append(of + values)
    return lines


def main() -> None:
    """Do what ncu would."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--way", choices=["well", *WAYS])
    parser.add_argument("--query-metrics", action="store_true")
    parser.add_argument("--csv", action="store_true", required="--query-metrics" not in sys.argv)
    for option, choices in (
        ("page", ["raw"]),
        ("print-units", ["base", "auto"]),
        ("clock-control", ["none"]),
        ("profile-from-start", ["off"]),
        ("target-processes", ["application-only"]),
    ):
        parser.add_argument(f"--{option}", choices=choices)
    parser.add_argument("--metrics", type=lambda text: sorted(text.split(",")))
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    lacking = ncu.METRICS["tensor %"] if given.way == "lacks one counter" else ()
    if given.query_metrics:
        if given.way != "well":
            sys.exit("==ERROR== Driver could not be loaded.")
        print("\n".join(f"{name.split('.')[0]}   Counter   #" for names in ncu.METRICS.values() for name in names))
        return
    unknown = [name for name in given.metrics if name in lacking or given.way == "knows no counter"]
    if given.way == "takes too long":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"], check=True)
    if unknown or given.way == "may not read":
        said = [f"==ERROR== Failed to find metric {name}" for name in unknown] or [DENIED]
        given.log_file.write_text("\n".join(["==PROF== Connected to process 4711 (python3)", *said]))
        sys.exit(1)
    subprocess.run(given.program, check=True)
    with given.log_file.open("w") as file:
        file.write("==PROF== Connected to process 4711 (python3)\n")
        file.writelines(f'==PROF== Profiling "{name}": 0%....50%....100% - 9 passes\n' for name in LAUNCHES)
        csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(page(given.metrics))
        file.write("==PROF== Disconnected from process 4711\n")


if __name__ == "__main__":
    main()
