"""A process that comes to an exchange by itself is told so when its group's timeout is over: it does not hang."""

from __future__ import annotations

import json
from pathlib import Path

from .processes import run_together


def test_who_comes_by_itself_is_told(tmp_path: Path) -> None:
    run_together("tests.parallel.waiting", 2, str(tmp_path))
    told = json.loads((tmp_path / "told.json").read_text())
    assert told.keys() == {"forward", "backward", "step"}
    for place, words in (
        ("forward", "this training forward"),
        ("backward", "the backward"),
        ("step", "this step of an"),
    ):
        assert told[place].startswith(f"not every process came to {words}"), told[place]
