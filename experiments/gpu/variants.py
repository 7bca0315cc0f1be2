"""Launches of the package against those that compete with them (`contests.py`), interleaved in one comparison.

Values come first: one that is wrong is not timed. A candidate is kept where the package's launch takes at least `KEEP`
times as long, beyond what the same launch, timed twice, differs from itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .book import Row, is_lost
from .contests import CONTESTS, WARPS_APART, Contest, Step
from .machine import Machine, over
from .numerics import EPS, poisoned, three_way
from .page import number

if TYPE_CHECKING:
    from .compiled import Report

KEEP = 1.03
ALL = {**CONTESTS, **WARPS_APART}


class Nowhere(Machine):
    """A device without memory, where launches are only compiled."""

    device = "meta"


def launch_all(name: str) -> None:
    """Launch all that competes in a contest, where launches are only compiled."""
    contest = ALL[name](Nowhere())
    for step in (contest.before, *contest.after.values()):
        step()


def flaw(name: str, said: Report) -> str | None:
    """Return in what a compiled kernel of a contest is not what it is called, or None."""
    if said.spills or said.stack:
        return "it spills"
    if said.name.startswith("bulk_") and not any(copy.startswith("UTMALDG") for copy in said.copies):
        return "the copy engine brings nothing"
    if said.name.startswith("bulk_") and said.apart is not name.endswith("warps apart"):
        return "its warps are not set apart" if not said.apart else "its warps are set apart"
    return None


def compete(machine: Machine, make: Callable[[Machine], Contest]) -> dict[str, Any]:
    """Return times of the package's launch and of each candidate that is right, and which are to be kept."""
    contest = make(machine)
    exact, low = contest.plain(torch.float64), contest.plain(machine.low)
    wrong: dict[str, str] = {}
    steps: dict[str, Step] = {"before": contest.before}
    for name, step in {"before": contest.before, **contest.after}.items():
        try:
            with poisoned():
                one, other = step(), step()
            found = three_way(one, low, exact, EPS[machine.low], contest.names)
            if not found["holds"]:
                wrong[name] = f"{found['worst']} is wrong by {number(found['error'])}, plain {number(found['plain'])}"
            elif not all(map(torch.equal, one, other)):
                wrong[name] = "it gives other bits the second time"
            else:
                steps[name] = step
        except Exception as error:  # one that cannot be launched leaves the others be
            if is_lost(error):
                raise
            wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
    del exact, low
    times = machine.compare({**steps, "before, again": contest.before})
    for name, step in steps.items():
        times[name]["host us"] = machine.host_time(step, 10) * 1e6
    spread = abs((over(times, "before, again", "before") or 1.0) - 1.0)
    ratios = {name: over(times, "before", name) for name in steps if name != "before"}
    said = [f"{name}: not timed, {why}" for name, why in wrong.items()]
    for name, ratio in ratios.items():
        said.append(verdict(name, times["before"].get("median_ms", 0.0), ratio, spread))
    return {"holds": not wrong, "times": times, "ratios": ratios, "spread": spread, "notes": said}


def verdict(name: str, before: float, ratio: float | None, spread: float) -> str:
    """Return what a page says of a candidate."""
    if ratio is None:
        return f"{name}: leave, not measured"
    word = "keep" if ratio >= KEEP + spread else "leave"
    times = f"before {number(before * 1e3)} µs, after {number(before / ratio * 1e3)} µs, ratio {ratio:.3f}"
    return f"{name}: {times}: **{word}** (keep from {KEEP + spread:.3f})"


@dataclass(frozen=True)
class Risky(Row):
    """A row that may hang, and is not waited for."""

    @property
    def limit(self) -> float:
        """After so many seconds it is taken to hang."""
        return 20.0


def rows(machine: Machine, found: Callable[[], dict[str, Any]]) -> Iterator[Row]:
    """Yield a row for each contest."""
    for name, make in CONTESTS.items():
        yield Row(name, partial(compete, machine, make), 2, kind=name.split(" of ")[0])
    for name, make in WARPS_APART.items():
        if not any("it ran for more than" in found().get(other, {}).get("error", "") for other in WARPS_APART):
            yield Risky(name, partial(compete, machine, make), 2, kind="warps apart")
