"""mergekit itself on the same checkpoints: MERGEKIT=…/bin/mergekit-yaml pytest tests/merge/test_mergekit.py

mergekit pins packages that moa does not, so it lives in an environment of its own (seen with mergekit 0.1.5).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moa.merge import merge, read_difference
from tests import models

from .tools import assert_close

MERGEKIT = os.environ.get("MERGEKIT") or shutil.which("mergekit-yaml")
pytestmark = pytest.mark.skipif(MERGEKIT is None, reason="no mergekit: name its mergekit-yaml in $MERGEKIT")
WEIGHTS = [0.2, 0.5, 0.9]
BREADCRUMBS = {"density": 0.5, "gamma": 0.05}
# mergekit's method -> its parameters of each model, and of the whole; our method, its options, our weights
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str, dict[str, Any], list[float] | None]] = {
    "linear": ({}, {}, "average", {}, WEIGHTS),
    "task_arithmetic": ({}, {"normalize": False}, "task_arithmetic", {}, WEIGHTS),
    "ties": ({"density": 0.3}, {}, "ties", {"density": 0.3, "definition": "mergekit"}, WEIGHTS),
    "breadcrumbs": (BREADCRUMBS, {"normalize": False}, "breadcrumbs", BREADCRUMBS, WEIGHTS),
    "breadcrumbs_ties": (
        BREADCRUMBS,
        {"normalize": True},
        "breadcrumbs_ties",
        {**BREADCRUMBS, "definition": "mergekit"},
        WEIGHTS,
    ),
    "model_stock": ({}, {}, "model_stock", {}, None),
    "slerp": ({}, {"t": 0.3}, "slerp", {}, [0.7, 0.3]),
    "dare_linear": ({"density": 1.0}, {"normalize": False}, "dare", {"density": 1.0}, WEIGHTS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and three others not far from it."""
    path = tmp_path_factory.mktemp("mergekit")
    models.llama().save_pretrained(path / "base")
    for n in range(3):
        model = models.llama()
        torch.manual_seed(50 + n)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(path / f"m{n}")
    return path


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_mergekit_writes(folder: Path, tmp_path: Path, name: str) -> None:
    own, whole, method, options, weights = CASES[name]
    two = name == "slerp"
    used = range(2 if two else 3)
    rows = [
        {
            "model": str(folder / f"m{n}"),
            "parameters": {**own, **({} if weights is None or two else {"weight": WEIGHTS[n]})},
        }
        for n in used
    ]
    recipe: dict[str, Any] = {"merge_method": name, "models": rows, "parameters": whole, "dtype": "float32"}
    if name != "linear":
        recipe["base_model"] = str(folder / ("m0" if two else "base"))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [str(MERGEKIT), str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    theirs: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        theirs |= load_file(file)
    base = load_file(folder / "base" / "model.safetensors")
    if two:
        options = {"base": base}
    ours = merge([read_difference(folder / f"m{n}", folder / "base") for n in used], weights, method, **options)
    for key, weight in base.items():
        assert_close(ours[key].dense(), theirs[key] - weight, 1e-4)
    other = merge([read_difference(folder / f"m{n}", folder / "base") for n in used[:2]], None, "task_arithmetic")
    with pytest.raises(AssertionError):
        assert_close(other[key].dense(), theirs[key] - weight, 1e-4)
