"""What the documents say is so: public names, docstrings, README snippets. Run: pytest tests/test_docs.py"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moa
from moa.experts import FAMILIES
from moa.recipes import RECIPES
from moa.routers import ROUTERS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SHAPE = re.compile(r"\((?:|\w|\*\w*rows,?|\w,|(?:\*\w*rows|[\w·.…*+ -]+)(?:, ?[\w·.…*+ -]+)+,?)\)|any shape|scalar")


def public() -> dict[str, object]:
    """Return the public callables of moa and of the modules that hold them, by dotted name."""
    found: dict[str, object] = {}
    for name in moa.__all__:
        value = getattr(moa, name)
        if callable(value):
            found[name] = value
    modules = [
        "objective.losses",
        "routers.select",
        "kernels",
        "types",
        "model.inputs",
        "objective.objective",
        "formats.checkpoint",
        "formats.peft_export",
        "folding.weights",
    ]
    for path in modules:
        module = importlib.import_module(f"moa.{path}")
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in names:
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith("moa"):
                found[f"{path}.{name}"] = value
    for table in (ROUTERS, FAMILIES, RECIPES):
        found |= {cls.__qualname__: cls for cls in table.values()}
    return found


PUBLIC = public()


def members(value: object) -> list[tuple[str, object]]:
    """Return a callable and, of a class, the public methods written in moa."""
    out = [("", value)]
    if inspect.isclass(value):
        for name, member in vars(value).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if inspect.isfunction(function) and not name.startswith("_"):
                out.append((name, function))
    return out


@pytest.mark.parametrize("name", list(PUBLIC))
def test_every_public_callable_says_what_it_does(name):
    for method, value in members(PUBLIC[name]):
        where = f"{name}.{method}" if method else name
        doc = inspect.getdoc(value) or ""
        inherited = method and any(method in vars(base) for base in PUBLIC[name].__mro__[1:])
        assert doc or (inherited and method in ("extra_repr",)), f"{where} has no docstring"
        first = doc.split("\n")[0] if doc else "x."
        assert first.rstrip().endswith((".", ":", "…")) or "\n" in doc, (
            f"{where}: the first line is no sentence: {first!r}"
        )


def takes_tensors(function: object) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(re.search(r"\bTensor\b", str(p.annotation)) for p in parameters)


@pytest.mark.parametrize("name", list(PUBLIC))
def test_what_takes_tensors_gives_their_shapes(name):
    owner = PUBLIC[name]
    for method, value in members(owner):
        if not takes_tensors(value) or method in ("extra_repr",):
            continue
        doc = inspect.getdoc(value) or ""
        assert SHAPE.search(doc), f"{name}.{method} takes tensors and names no shape: {doc!r}"


def test_the_public_names_are_the_documented_ones():
    assert len(moa.__all__) == len(set(moa.__all__)) <= 25
    assert dir(moa) == sorted(moa.__all__)
    for name in moa.__all__:
        assert getattr(moa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        moa.nonsense  # noqa: B018


def test_the_legend_is_in_the_types():
    text = inspect.getdoc(importlib.import_module("moa.types"))
    for letter in ("B batch", "S sequence", "T flattened rows", "*rows", "E experts", "K active", "M routing samples"):
        assert letter in text


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_names_its_paper(name):
    assert RECIPES[name].paper and RECIPES[name].name == name


def test_readme_is_there_and_names_every_recipe_and_public_name():
    if not README.exists():
        pytest.fail("README.md is missing: the package metadata names it")
    text = README.read_text()
    for name in RECIPES:
        assert f"`{name}`" in text, f"README does not list the recipe {name}"
    for name in ("build", "load", "RoutingMonitor", "export_expert", "make demo", "make test"):
        assert name in text


def snippets() -> list[str]:
    if not README.exists():
        return []
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(snippets())))
def test_readme_snippets_run(number, tmp_path):
    """Each in a fresh process and an empty folder, as a reader would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippets()[number]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, f"{snippets()[number]}\n{done.stderr[-3000:]}"


def test_no_machine_paths_in_what_is_committed():
    """Nothing of the machine it was written on."""
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    bad = re.compile(r"/(?:home|root|work|Users)/[a-z]\w+/")
    for name in files:
        if Path(name).suffix in {".py", ".md", ".toml", ".yaml", ".txt", ""} and (ROOT / name).is_file():
            found = bad.search((ROOT / name).read_text(errors="ignore"))
            assert found is None or name == "tests/test_docs.py", f"{name}: {found}"


def test_shapes_in_docstrings_are_recognised():
    for good in ("x (*rows, i) -> y", "(B,) int64", "the loss ()", "(E, r, i)", "weights (*rows, K)"):
        assert SHAPE.search(good), good
    for bad in ("Return it.", "see the paper (Fedus)", "1,000 (about)"):
        assert not SHAPE.search(bad), bad
