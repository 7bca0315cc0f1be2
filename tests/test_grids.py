"""The comparison rule: no arm of a result that compares accuracy lacks a grid of learning rates.

A learning rate that one method was tuned for and others were not decides most comparisons (arXiv 2601.22708). Every
result is one of a comparison, whose grids are read from it here, or says why it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import table_text
from moa.errors import ConfigError
from moa.monitor.compare import check_grids

Grids = dict[str, dict[str, set[float]]]
RESULTS = sorted(path.stem for path in (Path(table_text.HERE) / "results").glob("*.json"))


def compared(found: dict[str, Any]) -> Grids:
    """Return the rates of each arm, as `moa.compare` keeps them."""
    return {"": {arm: {float(rate) for rate in row["validation"]} for arm, row in found["arms"].items()}}


def tuned_demo(found: dict[str, Any]) -> Grids:
    """Return setting -> arm -> rates of the demo's tuning."""
    grids: Grids = {}
    for run in found["runs"]:
        grids.setdefault(run["setting"], {}).setdefault(run["arm"], set()).add(run["learning_rate"])
    return grids


def demo(found: dict[str, Any]) -> Grids:
    """Return setting -> arm -> rates: those of its tuning, for the arms that it has itself."""
    tuned = tuned_demo(table_text.result("demo_tuning"))
    return {name: {arm: tuned[name].get(arm, set()) for arm in arms} for name, arms in found["settings"].items()}


def families(found: dict[str, Any]) -> Grids:
    """Return the rates of each family's rows, one expert and 8."""
    return {"": {name: {float(rate) for rate in row["held_out"]} for name, row in found["rows"].items()}}


def merged(found: dict[str, Any]) -> Grids:
    """Return seed -> kind of adapter -> rates; a head by itself is the floor that adapters are measured from."""
    grids: Grids = {}
    for row in found["rows"]:
        if row.get("phase") == "tune":
            own = grids.setdefault(str(row.get("seed", "")), {})
            own[row["kind"]] = {float(rate) for rate in row["rates_tried"]}
    kinds = set(found["summary"]) - {"head_alone"}
    assert all(set(own) == kinds for own in grids.values())
    return grids


def crossed(found: dict[str, Any]) -> Grids:
    """Return method -> rates of its own; the head by itself, which has none, is the floor."""
    grids: dict[str, set[float]] = {method: set() for method in found["settings"]["methods"] if method != "head"}
    for row in found["tuning"]["tried"]:
        if row["method"] in grids:
            grids[row["method"]].add(row["lr"])
    return {"": grids}


COMPARISONS: dict[str, Callable[[dict[str, Any]], Grids]] = {
    "calibration": compared,
    "cross_domain": crossed,
    "demo": demo,
    "demo_tuning": tuned_demo,
    "family_accuracy": families,
    "merging": merged,
    "morph": compared,
}
COST = "time, memory or bytes are compared"
OTHERS = {
    **dict.fromkeys(
        ("end_to_end", "expert_parallel", "families", "imports", "kernels_cpu", "memory", "merge_bench"), COST
    ),
    **dict.fromkeys(("ddp", "launching", "lora_pro", "monitor", "pool", "serving", "step", "systems"), COST),
    "federated": "bytes a round are compared; its accuracies are of seconds of training, and no table has them",
    "faithfulness": "one model, before and after one training",
    "remix_granularity": "one method at one rate, against itself with its router at rest",
    "loram": "one recipe on two bases at one rate, and says that it is tuned on neither",
    "grpo": "one method at one rate, by itself",
    "fuzz": "what breaks",
    "kills": "what breaks",
    "peft_suite": "what breaks",
    "soak": "what breaks",
}


def test_every_result_is_a_comparison_or_says_why_not() -> None:
    assert set(RESULTS) <= set(COMPARISONS) | set(OTHERS), "say in tests/test_grids.py what a new result compares"
    assert not set(COMPARISONS) & set(OTHERS)


@pytest.mark.parametrize("name", [name for name in RESULTS if name in COMPARISONS])
def test_no_arm_lacks_a_grid(name: str) -> None:
    found = COMPARISONS[name](table_text.result(name))
    assert found and all(len(arms) > 1 for arms in found.values())
    for arms in found.values():
        check_grids({arm: sorted(rates) for arm, rates in arms.items()})


def test_an_arm_without_one_is_found() -> None:
    grid = {"0.1": 0.0, "0.2": 0.0, "0.3": 0.0}
    for rates in ({}, {"0.1": 0.0}, {"0.1": 0.0, "0.2": 0.0, "0.3": 0.0, "0.4": 0.0}):
        with pytest.raises(ConfigError):
            check_grids(
                {
                    a: sorted(r)
                    for a, r in compared({"arms": {"x": {"validation": grid}, "y": {"validation": rates}}})[""].items()
                }
            )
