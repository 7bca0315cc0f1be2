"""Who may import whom, how long a file may be, what `import moa` costs. Run: pytest tests/test_imports.py"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moa"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350  # lines

# part -> the other parts of moa that it may import; what is not listed is an application and may import any
ALLOWED = {
    "errors": set(),
    "types": {"errors"},
    "kernels": {"errors", "types"},
    "routers": {"errors", "types"},
    "experts": {"errors", "types", "kernels"},
    "trace": {"errors", "types"},
    "losses": {"errors", "types"},
    "monitor": {"errors", "types"},
    "inputs": {"errors", "types"},
    "outputs": {"errors", "types"},
    "objective": {"errors", "types", "trace", "losses"},
    "merge": {"errors"},
    "layers": {"errors"},
    "mixture": {"errors", "types", "routers", "experts", "kernels", "layers"},
    "folding": {"errors", "types", "layers", "mixture"},
    "checkpoint": {"errors"},
    "stepping": {"errors"},
}
# the framework is known where models meet it, and in the applications
ONLY_IN = {
    "triton": {"kernels/triton_*.py"},
    "megablocks": {"kernels/megablocks.py"},
    "transformers": {f"{n}.py" for n in ("model", "callbacks", "heads", "tasks", "train", "runs", "demo", "cli")},
    "peft": {"nowhere"},
    "datasets": {f"{n}.py" for n in ("tasks", "train", "runs", "demo", "cli")},
    "matplotlib": {"figures.py", "report.py"},
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@cache
def imports(file: Path) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return the parts of moa that a file imports, those of them at import time, and the other packages."""
    tree = ast.parse(file.read_text())
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only:
            inside |= set(ast.walk(node))
    own, early, other = set(), set(), set()
    package = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        found: set[str] = set()
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if base or node.module:
                found = {(*base, *(node.module or "").split("."))[0]}
            else:
                found = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            found, other = ({parts[1]}, other) if parts[0] == "moa" and parts[1:] else (set(), other | {parts[0]})
        elif isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
        own |= found
        early |= found if node not in inside else set()
    return frozenset(own), frozenset(early), frozenset(other)


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_import_rule(file):
    me = part(file)
    if me in ALLOWED:
        wrong = imports(file)[0] - ALLOWED[me] - {me}
        assert not wrong, f"{name_of(file)} imports {sorted(wrong)}"
    for package, where in ONLY_IN.items():
        if package in imports(file)[2]:
            assert any(Path(name_of(file)).match(pattern) for pattern in where), f"{name_of(file)} imports {package}"


def test_no_circle_at_import_time():
    graph = {part(f): set() for f in FILES}
    for file in FILES:
        graph[part(file)] |= {name for name in imports(file)[1] if name in graph} - {part(file)}

    def visit(node: str, path: tuple[str, ...]) -> None:
        assert node not in path, " -> ".join((*path, node))
        for following in graph[node]:
            visit(following, (*path, node))

    for node in graph:
        visit(node, ())


def test_the_import_rule_sees_a_wrong_import(tmp_path, monkeypatch):
    wrong = tmp_path / "moa" / "routers" / "bad.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("from ..experts import LoRABank\nimport triton\ndef f():\n    from ..model import MoAModel\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "moa")
    assert imports(wrong) == ({"experts", "model"}, {"experts"}, {"triton"})
    with pytest.raises(AssertionError, match=r"experts.*model"):
        test_import_rule(wrong)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_one_idea_a_file(file):
    lines = len(file.read_text().splitlines())
    assert lines <= LONGEST, f"{name_of(file)} has {lines} lines: split it"


COST = """
import sys, time
import torch
start = time.perf_counter()
import moa
cost = time.perf_counter() - start
heavy = {"transformers", "triton", "megablocks", "matplotlib", "datasets", "tensorboard", "peft"}
print(cost, *(heavy & set(sys.modules) - set(sys.argv)))
"""


def test_importing_moa_costs_next_to_nothing():
    """At most 0.2 s beyond torch, best of five, and nothing heavy comes along."""
    already = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(*sys.modules)"], capture_output=True, text=True, check=True
    ).stdout.split()
    costs = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", COST, *(n for n in already if "." not in n)],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, *heavy = done.stdout.split()
        assert not heavy, f"import moa brings {heavy}"
        costs.append(float(seconds))
        if min(costs) <= 0.2:
            break
    assert min(costs) <= 0.2, costs


def test_routers_experts_and_kernels_work_without_transformers():
    """The layers are plain PyTorch: only the model knows the framework."""
    script = """
import sys
sys.modules["transformers"] = sys.modules["triton"] = None
import torch, moa
from moa.recipes import make_recipe, Site
layer = torch.nn.Linear(4, 4).requires_grad_(False)
branches = make_recipe("topk", n_experts=3, k=2).build(Site("layer", layer, 4, 4))
moa.Mixture(layer, branches, moa.Context(), "layer")(torch.ones(2, 4)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
