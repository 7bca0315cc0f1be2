"""Where a file system has no locks. Run: pytest tests/formats/test_scratch_without_locks.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from moa.formats import scratch


def test_nothing_is_left_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_lock", lambda folder: None)
    with scratch.scratch(tmp_path / "model") as folder:
        assert folder.is_dir()
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())
