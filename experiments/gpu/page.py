"""One page of what was found, in markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def page(content: dict[str, Any]) -> str:
    """Return the page of a book's content."""
    environment = content.get("environment", {})
    said = ", ".join(f"{key} {value}" for key, value in environment.items())
    parts = ["# moa on one GPU", said or "no environment", _goals(content), _speed(content)]
    sections, left = content["sections"], content.get("left over", {})
    for section in dict.fromkeys([*sections, *(name for name, rows in left.items() if rows)]):
        parts.append(f"## {section}\n\n{_summary(section, sections.get(section, {}), left.get(section, []))}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _goals(content: dict[str, Any]) -> str:
    """Return every target beside what was measured."""
    lines = []
    for rows in content["sections"].values():
        for name, row in rows.items():
            for goal in _found(row).get("goals", []):
                value = "not measured" if goal["value"] is None else number(goal["value"])
                holds = "" if goal["value"] is None else "yes" if goal["holds"] else "**no**"
                lines.append([f"{name}: {goal['what']}", value, goal["wanted"], holds])
    return "## Goals\n\n" + table(["goal", "measured", "wanted", "holds"], lines) if lines else ""


def _speed(content: dict[str, Any]) -> str:
    lines = []
    for rows in content["sections"].values():
        for name, row in rows.items():
            for step, times in _found(row).get("times", {}).items():
                time = times.get("median_ms")
                said = number(time) if time is not None else times.get("error", "not measured")
                peak = times.get("peak_mib")
                rest = [f"{key} {number(value)}" for key, value in times.items() if key not in _KNOWN]
                lines.append([name, step, said, "" if peak is None else f"{peak:.0f}", ", ".join(rest)])
    header = ["row", "step", "median ms", "peak MiB", "more"]
    return "## Times\n\n" + table(header, lines) if lines else ""


_KNOWN = ("median_ms", "least_ms", "spread_ms", "rounds", "peak_mib", "error")


def _summary(section: str, rows: dict[str, Any], left: Sequence[str]) -> str:
    """Return what a section's rows say beside goals and times."""
    lines = []
    checked = [name for name, row in rows.items() if "holds" in _found(row)]
    held = [name for name in checked if rows[name]["found"]["holds"]]
    if checked:
        lines.append(f"{len(held)} of {len(checked)} checks hold.")
    for name in checked:
        if name not in held:
            lines.append(f"- **does not hold**: {name}: {_short(rows[name]['found'])}")
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"- **failed**: {name}: {row['error'].splitlines()[-1][:300]}")
        for key in ("paste", "notes"):
            for line in _lines(_found(row).get(key)):
                lines.append(f"- {name}: `{line}`" if key == "paste" else f"- {name}: {line}")
    if left:
        some = ", ".join(left[:6]) + (" …" if len(left) > 6 else "")
        lines.append(f"- not measured, for want of time: {len(left)} rows ({some})")
    taken = sum(row.get("seconds", 0.0) for row in rows.values())
    return "\n".join([*lines, f"- {len(rows)} rows in {taken:.0f} s"])


def goal(what: str, value: float | None, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    """Return a target beside what was measured, None where it was not."""
    wanted = f"≤ {at_most:g}" if at_most is not None else f"≥ {at_least:g}"
    holds = None
    if value is not None:
        holds = value <= at_most if at_most is not None else value >= (at_least or 0.0)
    return {"what": what, "value": value, "wanted": wanted, "holds": holds}


def number(value: Any) -> str:
    """Return three digits or so."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _found(row: dict[str, Any]) -> dict[str, Any]:
    found = row.get("found")
    return found if isinstance(found, dict) else {}


def _lines(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _short(found: dict[str, Any]) -> str:
    return ", ".join(f"{k} {number(v)}" for k, v in found.items() if k not in ("holds", "errors", "said"))[:300]
