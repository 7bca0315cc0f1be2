"""What was found, row by row, in one file that is whole at every moment, so that a run can be cut off and taken up."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The context of a GPU is lost after such an error: nothing can be run in that process any more.
LOST = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert", "CUDA error",
        "illegal instruction", "illegal address", "CUBLAS_STATUS_EXECUTION_FAILED")  # fmt: skip
PATIENCE = 20.0  # in a rehearsal, where other work may share the machine


@dataclass(frozen=True)
class Row:
    """One thing to measure.

    Args:
        name: what the row is called in its section.
        run: measures it.
        seconds: about how long it takes on a GPU; it is not begun with less time than that.
        kind: rows of one kind take the same way through the code; a quick rehearsal runs one of each.
        slow: a quick rehearsal leaves it out.
    """

    name: str
    run: Callable[[], Any]
    seconds: float = 1.0
    kind: str = ""
    slow: bool = False

    @property
    def limit(self) -> float:
        """After so many seconds a row is taken to hang."""
        return max(60.0, 5 * self.seconds)


class Lost(Exception):
    """The device cannot be used by this process any more."""


def is_lost(error: BaseException) -> bool:
    """Return whether the device is lost for this process."""
    return any(words in str(error) for words in LOST)


class Book:
    """The results of a run, on disk after each row.

    Args:
        path: the file, read if it is there.
        patience: multiplies the time after which a row is taken to hang.
    """

    def __init__(self, path: Path, patience: float = 1.0) -> None:
        self.path, self.patience = path, patience
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"sections": {}}

    def rows(self, section: str) -> dict[str, Any]:
        """Return the rows of a section, by name."""
        found: dict[str, Any] = self.content["sections"].setdefault(section, {})
        return found

    def save(self) -> None:
        """Write the file in one step."""
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        os.replace(scratch, self.path)

    def put(self, section: str, row: str, value: Any, seconds: float) -> None:
        """Keep what a row found."""
        self.rows(section)[row] = {"found": value, "seconds": round(seconds, 2)}
        self.content.pop("under way", None)
        self.save()

    def begin(self, section: str, row: Row) -> None:
        """Say which row is under way, and when it is taken to hang: see `run.py`."""
        now = time.time()
        self.content["under way"] = {
            "section": section,
            "row": row.name,
            "since": now,
            "until": now + self.patience * row.limit,
        }
        self.save()

    def fail(self, section: str, row: str, error: str, seconds: float) -> None:
        """Keep why a row found nothing."""
        self.rows(section)[row] = {"error": error, "seconds": round(seconds, 2)}
        self.content.pop("under way", None)
        self.save()

    def cut(self, section: str, row: str) -> None:
        """Count a row that was under way when the time was over to those that had none: another call runs it."""
        self.content.setdefault("left over", {}).setdefault(section, []).append(row)
        self.content.pop("under way", None)
        self.save()

    def lose(self, section: str) -> None:
        """Count a process that a section cost."""
        lost: dict[str, int] = self.content.setdefault("processes lost", {})
        lost[section] = lost.get(section, 0) + 1
        self.save()

    def run(self, section: str, rows: Iterable[Row], deadline: float) -> list[str]:
        """Run the rows that are not there yet, until a deadline on the clock of `time.time`; return those left over.

        Raises:
            Lost: a row took the device with it; what it said is kept.
        """
        left = []
        for row in rows:
            if row.name in self.rows(section):
                continue
            start = time.time()
            if start + row.seconds > deadline:
                left.append(row.name)
                continue
            self.begin(section, row)
            try:
                found = row.run()
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                where = traceback.extract_tb(error.__traceback__)[-3:]
                places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where))
                self.fail(section, row.name, f"{said[:600]} ({places})", time.time() - start)
                if is_lost(error):
                    self.lose(section)
                    raise Lost(said) from error
            else:
                self.put(section, row.name, found, time.time() - start)
        return left
