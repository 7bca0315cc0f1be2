"""Processes killed while they write; `make kills` does it hundreds of times. Run: pytest tests/test_kills.py"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import kills


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("way", [way for way in kills.WAYS if way != "checkpoint"])
def test_a_killed_writer_leaves_the_old_or_the_new(way: str) -> None:
    counts = kills.kill(way, 4)
    assert counts["lost"] == 0 and counts["left over"] == 0, counts


def test_a_half_written_state_is_seen(tmp_path: Path) -> None:
    """The reader that judges the kills finds files of two states."""
    write: Callable[[int], None]
    write, read = kills.writer("merge into the base", tmp_path)
    write(1)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    older = [shard.read_bytes() for shard in shards]
    write(2)
    assert read() == 2 and len(shards) > 1
    changed = next(i for i, shard in enumerate(shards) if shard.read_bytes() != older[i])
    shards[changed].write_bytes(older[changed])
    with pytest.raises(AssertionError, match="several states"):
        read()
