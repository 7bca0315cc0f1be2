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
from safetensors.torch import load_file, save_file

from moa.merge import Dense, merge, read_difference, slerp
from moa.merge.sparsify import drop_by_rank, drop_random, generator_for, keep_largest, keep_middle, keep_probabilities
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
    "breadcrumbs_ties": (BREADCRUMBS, {}, "breadcrumbs_ties", {**BREADCRUMBS, "definition": "mergekit"}, WEIGHTS),
    "ties with its defaults": ({}, {}, "ties", {"definition": "mergekit"}, WEIGHTS),
    "dare_ties with its defaults": ({}, {}, "dare_ties", {"definition": "mergekit"}, WEIGHTS),
    "della with its defaults": ({}, {}, "della", {"definition": "mergekit"}, WEIGHTS),
    "dare_ties divided": ({}, {"normalize": True}, "dare_ties", {"definition": "mergekit", "normalize": True}, WEIGHTS),
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
    recipe: dict[str, Any] = {"merge_method": name.split()[0], "models": rows, "parameters": whole, "dtype": "float32"}
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


# mergekit's own functions, in its own environment, on tensors from a file; its draws are replaced by ours.
FUNCTIONS = """
import sys
import torch
from safetensors.torch import load_file, save_file
from mergekit import sparsify
from mergekit.merge_methods.slerp import slerp

given, out = load_file(sys.argv[1]), {}
seen = []

def bernoulli(probability):
    seen.append(probability.clone())
    return (draws.reshape(probability.shape) < probability).to(probability.dtype)

torch.bernoulli = bernoulli
l1 = sparsify.RescaleNorm.l1
for name in [n for n in given if n.startswith("x")]:
    x, draws = given[name], given["draws " + name]
    out["dare " + name] = sparsify.bernoulli(x, 0.4, l1)
    out["della " + name] = sparsify.della_magprune(x, 0.4, 0.15, l1)
    out["probabilities " + name] = seen[-1].reshape(x.shape)
    out["outliers " + name] = sparsify.magnitude_outliers(x, 0.5, None, 0.1)
    out["largest " + name] = sparsify.magnitude(x, 0.001)
    out["few outliers " + name] = sparsify.magnitude_outliers(x, 0.5, None, 0.001)
for name in [n for n in given if n.startswith("a ")]:
    out["slerp " + name[2:]] = slerp(torch.tensor([0.3]), given[name][None], given["b " + name[2:]][None])[0]
save_file({n: t.contiguous() for n, t in out.items()}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What mergekit's functions were given, and what they gave."""
    path = tmp_path_factory.mktemp("functions")
    g = torch.Generator().manual_seed(0)
    given = {f"x{n}": torch.randn(s, generator=g) for n, s in enumerate([(12, 9), (40,), (5, 7, 3), (3, 6, 2, 2)])}
    given |= {f"draws {n}": torch.rand(x.shape, generator=generator_for(0, 0, n)) for n, x in given.items()}
    one = torch.randn(6, 5, generator=g)
    for name, other in {"apart": torch.randn(6, 5, generator=g), "opposite": -2 * one, "one": one}.items():
        given |= {f"a {name}": one.clone(), f"b {name}": other.clone()}
    given |= {"a number": torch.tensor([0.01]), "b number": torch.tensor([-0.02])}
    save_file(given, path / "in.safetensors")
    python = Path(str(MERGEKIT)).parent / "python"
    command = [str(python), "-c", FUNCTIONS, str(path / "in.safetensors"), str(path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    return given, load_file(path / "out.safetensors")


@pytest.mark.parametrize("name", ["x0", "x1", "x2", "x3"])
def test_its_sparsifiers_under_the_same_draws(
    name: str, functions: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    given, theirs = functions
    x = given[name]
    dare = drop_random(x, 0.4, generator_for(0, 0, name), definition="mergekit")
    assert_close(dare, theirs[f"dare {name}"], 1e-6)
    assert_close(keep_probabilities(x, 0.4, 0.15, "mergekit"), theirs[f"probabilities {name}"], 1e-6)
    della = drop_by_rank(x, 0.4, 0.15, generator_for(0, 0, name), definition="mergekit")
    assert_close(della, theirs[f"della {name}"], 1e-6)
    assert torch.equal(keep_middle(x, 0.5, 0.1), theirs[f"outliers {name}"])
    assert torch.equal(keep_middle(x, 0.5, 0.001), theirs[f"few outliers {name}"])
    assert torch.equal(keep_largest(x, 0.001, least=1), theirs[f"largest {name}"])


@pytest.mark.parametrize("name", ["apart", "opposite", "one", "number"])
def test_its_slerp(name: str, functions: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    given, theirs = functions
    got = slerp([Dense(given[f"a {name}"]), Dense(given[f"b {name}"])], [0.7, 0.3]).dense()
    assert_close(got, theirs[f"slerp {name}"], 1e-5)
