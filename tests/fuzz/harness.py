"""One surface under many damaged files: every one is refused by an error of moa's, or read as what it says."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

from moa.errors import MoaError
from tests.fuzz.surfaces import SURFACES

SECONDS = 8
MOST_MEGABYTES = 64  # over what was in use before the file was read


class Hang(BaseException):
    """It took too long."""


def _ring(*_: Any) -> None:
    raise Hang


def _peak() -> int:
    """Return the largest resident size since `_forget_peak`, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def fuzz(name: str, n: int, seed: int) -> tuple[dict[str, float], dict[str, str]]:
    """Return the counts of n damaged inputs, and what else than an error of moa's came -> surface and number.

    Args:
        name: one of `SURFACES`.
        n: inputs.
        seed: of the damage.
    """
    surface = SURFACES[name]
    counts: dict[str, float] = {"tried": 0, "clean": 0, "accepted": 0, "other": 0, "hangs": 0, "most_megabytes": 0}
    found: dict[str, str] = {}
    measured = os.access("/proc/self/clear_refs", os.W_OK)
    old = signal.signal(signal.SIGALRM, _ring)
    with tempfile.TemporaryDirectory() as home, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good = Path(home) / "good"
        good.mkdir()
        surface.make(good)
        surface.read(_copy(good, name))
        for i in range(n):
            draw = random.Random(f"{seed} {name} {i}")
            folder = _copy(good, name)
            surface.damage(folder, draw)
            counts["tried"] += 1
            before = _forget_peak() if measured else 0
            signal.alarm(SECONDS)
            what = ""
            try:
                surface.read(folder)
                counts["accepted"] += 1
            except MoaError as error:
                what = "" if str(error) else "an error without words"
                counts["clean"] += not what
            except Hang:
                counts["hangs"] += 1
            except (Exception, MemoryError) as error:  # noqa: BLE001 - to count them is what this is for
                at = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__} {Path(at.filename).name}:{at.lineno} {str(error)[:110]!r}"
            finally:
                signal.alarm(0)
            grown = (_peak() - before) / 1e6 if measured else 0
            counts["most_megabytes"] = round(max(counts["most_megabytes"], grown), 1)
            if not what and grown > MOST_MEGABYTES:
                what = f"{grown:.0f} MB"
            if what:
                counts["other"] += 1
                found.setdefault(what, f"{name} {i}")
    signal.signal(signal.SIGALRM, old)
    return counts, found


def _copy(good: Path, name: str) -> Path:
    folder = good.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return folder
