"""What accelerate shards by FSDP2, from the configuration that docs/scaling.md shows, learns what one process does.

Run: pytest tests/parallel/test_accelerated.py; every recipe: -m slow
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import moa

from .processes import ROOT, run_together
from .steps import ONE_EACH, base_of, learned
from .test_processes import alone, assert_moved_alike

QUICK = ("topk-default", "xlora-default")
PAGE = ROOT / "docs" / "scaling.md"


def check(folder: Path, cases: tuple[str, ...]) -> None:
    """Fail unless each case learns in two processes what one learns."""
    (text,) = re.findall(r"```yaml\n# fsdp2.yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (folder / "fsdp2.yaml").write_text(text)
    run_together("tests.parallel.accelerated", 2, str(folder), str(folder / "fsdp2.yaml"), ",".join(cases))
    for case in cases:
        assert_moved_alike(case, learned(moa.load(folder / "out" / case, base_of(case))), alone(case, 2))


def test_accelerates_units_learn_what_one_process_does(tmp_path: Path) -> None:
    check(tmp_path, QUICK)


@pytest.mark.slow
def test_accelerates_units_learn_every_recipe(tmp_path: Path) -> None:
    check(tmp_path, ONE_EACH)
