"""Run PEFT's common tests with every recipe in PEFT's place, and count.

A case is passed; refused (moa raised an error of its own); failed; or not applicable, with the concept that moa has no
counterpart of. "strict" counts a refusal as no pass. PEFT's files are not here: name a checkout of its repository.

python -m experiments.peft_suite --peft PATH [--recipes topk remix] [--out experiments/results/peft_suite.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from experiments.bench.common import environment

from .facade import RECIPES

COMMAND = "python -m experiments.peft_suite --peft PATH"
ROOT = Path(__file__).resolve().parents[2]
TESTS = ("custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "seq_classifier")


def run(peft: Path, recipes: list[str], files: list[str]) -> list[dict[str, str]]:
    """Return what became of each case of PEFT's test files under each recipe.

    Args:
        peft: a checkout of PEFT, with src/ and tests/.
        recipes: of `RECIPES`.
        files: of `TESTS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cases.json"
        environment_of_run = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, peft / "src"))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "PEFT_SUITE_RECIPES": " ".join(recipes),
            "PEFT_SUITE_OUT": str(out),
        }
        options = ["-q", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider", "-p", "experiments.peft_suite.plugin"]
        tests = [f"tests/test_{name}.py" for name in files]
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", *options, *tests]
        subprocess.run(command, cwd=peft, env=environment_of_run, check=False)
        return json.loads(out.read_text())  # type: ignore[no-any-return]


def counted(cases: list[dict[str, str]]) -> dict[str, Any]:
    """Return the numbers of each recipe and of all, and the reasons of what did not pass."""
    recipes = {recipe: _numbers(case for case in cases if case["recipe"] == recipe) for recipe in _of(cases, "recipe")}
    reasons = {
        verdict: dict(Counter(case["why"] for case in cases if case["verdict"] == verdict).most_common())
        for verdict in ("failed", "refused", "not applicable")
    }
    not_passed = sorted(
        f"{case['recipe']}: {case['case']}: {case['why']}" for case in cases if case["verdict"] in ("failed", "refused")
    )
    return {"recipes": recipes, "all": _numbers(iter(cases)), "reasons": reasons, "not_passed": not_passed}


def _numbers(cases: Any) -> dict[str, float]:
    found = Counter(case["verdict"] for case in cases)
    applicable = found["passed"] + found["refused"] + found["failed"]
    strict = found["passed"] / max(applicable, 1)
    without = found["passed"] / max(applicable - found["refused"], 1)
    return {
        "applicable": applicable,
        **{verdict: found[verdict] for verdict in ("passed", "refused", "failed")},
        "strict_percent": round(100 * strict, 1),
        "without_refusals_percent": round(100 * without, 1),
    }


def _of(cases: list[dict[str, str]], key: str) -> list[str]:
    return list(dict.fromkeys(case[key] for case in cases))


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", type=Path, required=True, help="a checkout of PEFT, with src/ and tests/")
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES, "peft"], default=list(RECIPES))
    parser.add_argument("--files", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {
        "command": COMMAND,
        "environment": environment(),
        **counted(run(args.peft.resolve(), args.recipes, args.files)),
    }
    for name, row in {**result["recipes"], "all": result["all"]}.items():
        print(f"{name:8} " + " ".join(f"{key}={value}" for key, value in row.items()))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
