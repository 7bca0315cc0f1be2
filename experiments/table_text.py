"""What the tables made of results share: reading one, saying where it is from, and markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COMMANDS = {"monitor": "python -m experiments.bench.monitor"}  # results that do not hold their own


def result(name: str) -> dict[str, Any]:
    """Return what results/NAME.json holds."""
    found: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def made_by(name: str) -> str:
    """Return the line that says which command made a result, at which commit, and where it is."""
    found = result(name)
    commit = found.get("environment", found)["commit"]
    return f"`{found.get('command', COMMANDS.get(name))}` at {commit[:7]}: [{name}.json](results/{name}.json)"


def number(value: float) -> str:
    """Return three digits or so."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in markdown, its first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
