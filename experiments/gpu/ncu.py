"""NVIDIA's ncu on a program: which counters are asked for, and what it printed as numbers in base units."""

from __future__ import annotations

import contextlib
import csv
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from .processes import end

# What is counted -> its name; where there are several, the first that ncu knows on this device. The first of each are
# known to ncu 2024.1 on gh100; later ones rename some.
METRICS: dict[str, tuple[str, ...]] = {
    "seconds": ("gpu__time_duration.sum",),
    "bytes read": ("dram__bytes_read.sum", "dram__bytes_op_read.sum"),
    "bytes written": ("dram__bytes_write.sum", "dram__bytes_op_write.sum"),
    "DRAM %": ("dram__throughput.avg.pct_of_peak_sustained_elapsed",),
    "memory %": ("gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",),
    "SM %": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "tensor %": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_elapsed",
    ),
    "wgmma": ("sm__inst_executed_pipe_tensor_op_gmma.sum",),
    "warps %": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "issued %": ("smsp__issue_active.avg.pct_of_peak_sustained_active",),
    "L2 hits %": ("lts__t_sector_hit_rate.pct",),
    "local loads": ("smsp__inst_executed_op_local_ld.sum",),
    "local stores": ("smsp__inst_executed_op_local_st.sum",),
    "bank conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
    "shared wavefronts": ("l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",),
    "registers": ("launch__registers_per_thread",),
    "shared bytes": ("launch__shared_mem_per_block_dynamic",),
    "waves": ("launch__waves_per_multiprocessor",),
    **{
        f"waits for {what}": (f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio",)
        for what, name in (
            ("global memory", "long_scoreboard"),
            ("shared memory", "short_scoreboard"),
            ("a barrier", "barrier"),
            ("tensor cores", "gmma"),
            ("room in a pipe", "math_pipe_throttle"),
        )
    },
}
BUILT_IN = "launch__"  # of every launch, and in no list of counters
PREFIXES = {"": 1.0, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
WORDS = ("second", "s", "byte", "inst", "cycle", "sector", "warp", "register", "block", "thread", "hz")
LISTING = 8.0  # seconds for a list of counters
Counted = dict[str, float]


class NotCounted(Exception):
    """No counter of the program was read; the message is what ncu said."""


def factor(unit: str) -> float | None:
    """Return what a value in a unit is multiplied with, per second or per thread left as they are; None: not known."""
    over = unit.split("/")[0].strip()
    if over in ("", "%"):
        return 1.0
    for word in WORDS:
        if over.endswith(word) and over[: -len(word)] in PREFIXES:
            return PREFIXES[over[: -len(word)]]
    return None


def value(text: str, unit: str) -> float | None:
    """Return a printed value in base units, None where it is not a number or its unit is not known."""
    by = factor(unit)
    try:
        found = float(text.replace(",", ""))
    except ValueError:  # "n/a", "(!) n/a", or nothing
        return None
    return None if by is None or not math.isfinite(found) else found * by


def launches(text: str, labels: dict[str, str]) -> list[tuple[str, Counted]]:
    """Return the kernel's name and what was counted of each launch on a raw page: a header, a line of units, launches.

    Args:
        text: what ncu printed with `--csv --page raw`, its own messages among it.
        labels: metric -> what it is called in the result.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines or not lines[0].startswith('"ID"'):
        return []
    header, *rest = csv.reader(lines)
    units, *rows = rest or [[]]
    found = []
    for row in rows:
        if len(row) != len(header):  # ncu was killed in it
            continue
        cells = {name: (cell, unit) for name, cell, unit in zip(header, row, units, strict=True)}
        counted = {label: value(*cells[name]) for name, label in labels.items() if name in cells}
        kernel = cells["Kernel Name"][0].split("(")[0].strip()
        found.append((kernel, {label: number for label, number in counted.items() if number is not None}))
    return found


def chosen(known: Collection[str], without: Collection[str] = ()) -> dict[str, str]:
    """Return metric -> label of what is asked for.

    Args:
        known: base names that ncu lists, everything where it lists nothing.
        without: metrics that it refused.
    """
    found = {}
    for label, names in METRICS.items():
        for name in names:
            listed = not known or name.startswith(BUILT_IN) or name.split(".")[0] in known
            if listed and name not in without:
                found[name] = label
                break
    return found


def known_to(ncu: Sequence[str]) -> set[str]:
    """Return the base names of the counters of this device, none where ncu does not list them."""
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen([*ncu, "--query-metrics"], stdout=file, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LISTING)
        end(process)
        file.seek(0)
        names = {line.split()[0] for line in file if "__" in line}
    return names if process.returncode == 0 else set()


def profile(ncu: Sequence[str], program: Sequence[str], seconds: float) -> tuple[list[tuple[str, Counted]], list[str]]:
    """Return what was counted of each launch between the program's start and stop of profiling, and what was not there.

    Args:
        ncu: the command.
        program: the program's.
        seconds: after which both are killed.

    Raises:
        NotCounted: ncu is not here, or counted no launch.
    """
    if shutil.which(ncu[0]) is None:
        raise NotCounted(f"{ncu[0]} is not here")
    until, without = time.time() + seconds, set[str]()
    known = known_to(ncu)
    while True:
        labels = chosen(known, without)
        if not labels:
            break
        text, said = _run([*ncu, *_options(labels)], program, until)
        found = launches(text, labels)
        # The name of a counter that there is not ends ncu: the others are asked for again.
        refusals = " ".join(line for line in text.splitlines() if "Failed to find metric" in line)
        refused = {name for name in labels if re.search(rf"\b{name.split('.')[0]}\b", refusals)}
        if found or not refused or time.time() > until:
            break
        without |= refused
    if not found:
        raise NotCounted(said)
    counted = set().union(*(values for _, values in found))
    return found, [names[0] for label, names in METRICS.items() if label not in counted]


def _options(labels: dict[str, str]) -> list[str]:
    # The clocks are left as they are; each pass begins on a cold cache, as ncu does by default.
    return ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off",
            "--target-processes", "application-only", "--metrics", ",".join(labels)]  # fmt: skip


def _run(ncu: Sequence[str], program: Sequence[str], until: float) -> tuple[str, str]:
    """Return what ncu wrote, and what it comes to where that is not a page."""
    with tempfile.TemporaryDirectory() as folder:
        page, log = Path(folder) / "page", Path(folder) / "log"
        command = [*ncu, "--log-file", str(page), *program]
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        begun, killed = time.time(), ""
        try:
            process.wait(max(1.0, until - begun))
        except subprocess.TimeoutExpired:
            killed = f"it was killed after {time.time() - begun:.0f} s; "
        finally:
            end(process)
        text = page.read_text(errors="replace") if page.exists() else ""
        lines = [line for line in text.splitlines() if "==ERROR==" in line] or text.splitlines()[-2:]
        last = log.read_text(errors="replace").splitlines()[-2:]
    said = " ".join(lines) or "nothing"
    return text, f"{killed}ncu said: {said}; the program: {' '.join(last) or 'nothing'}"
