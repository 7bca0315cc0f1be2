"""A short slice of the fuzzer; `make fuzz` tries 30,000 files. Run: pytest tests/fuzz/test_fuzz.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.surfaces import SURFACES, Surface


@pytest.mark.parametrize("name", sorted(SURFACES))
def test_every_damaged_file_is_refused_or_read_as_it_is(name: str) -> None:
    counts, found = harness.fuzz(name, 30, seed=1)
    assert not found and not counts["hangs"], found
    assert counts["clean"] and counts["clean"] + counts["accepted"] == counts["tried"] == 30


def _raw(folder: Path) -> None:
    if (folder / "bad").exists():
        raise KeyError("rank")


def _large(folder: Path) -> None:
    if (folder / "bad").exists():
        assert len(bytearray(100_000_000)) > 0


@pytest.mark.parametrize(("read", "what"), [(_raw, "KeyError"), (_large, "MB")])
def test_what_is_not_clean_is_counted(read: Callable[[Path], None], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = Surface(lambda folder: None, lambda folder, draw: (folder / "bad").touch(), read)
    monkeypatch.setitem(SURFACES, "broken", broken)
    counts, found = harness.fuzz("broken", 3, seed=0)
    assert counts["other"] == 3 and what in next(iter(found))
