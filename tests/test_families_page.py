"""The tables of docs/families.md say what the code does. Run: pytest tests/test_families_page.py"""

from __future__ import annotations

from typing import Any

import pytest

from experiments import families
from moa.experts import FAMILIES, LoRABank


def test_the_page_says_what_the_code_does() -> None:
    text = families.PAGE.read_text(encoding="utf-8")
    written = text.split(families.BEGIN)[1].split(families.END)[0].strip()
    assert written == families.tables(), f"the tables of {families.PAGE} are old: run {families.COMMAND}"
    for name in FAMILIES:
        assert written.count(f"\n| `{name}` |") == 2


def test_wrong_cells_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula, a start and a reason that are not the code's."""
    before: Any = families.row("lora")
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=r"lora: E \* r \* i is 288 at"):
        patch.setitem(families.FORMULAS, "lora", "E * r * i")
        families.row("lora")
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="lora says zero_at_init=False"):
        patch.setattr(LoRABank, "zero_at_init", False)
        families.row("lora")
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="ia3 under"):
        patch.setattr(families, "REASONS", {})
        families.under_recipes("ia3")
    assert families.row("lora") == before
