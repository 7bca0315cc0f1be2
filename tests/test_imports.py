"""Who may import whom, how long a file may be, what `import moa` costs. Run: pytest tests/test_imports.py"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moa"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 350  # lines

# room -> the rooms and modules of moa that it may import, lazy and typing imports counted; every file belongs to one
NOUNS = {"errors", "types", "rows", "delta", "layers", "compat", "tables", "spectrum", "offload"}
LAYERS = NOUNS | {"kernels", "routers", "experts", "mixture"}
MODEL = LAYERS | {"recipes", "objective", "formats", "folding", "merge", "model"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "compat": set(),
    "rows": {"errors"},
    "types": {"errors", "rows"},
    "delta": {"errors"},
    "tables": {"errors"},
    "spectrum": {"errors"},
    "offload": {"errors"},
    "layers": {"errors", "compat", "offload"},
    "kernels": {"errors", "types", "compat"},
    "routers": {"errors", "types", "rows", "tables", "kernels", "compat"},
    "experts": NOUNS | {"kernels"},
    "mixture": NOUNS | {"kernels", "routers", "experts"},
    "recipes": LAYERS,
    "objective": {"errors", "types"},
    "formats": LAYERS | {"recipes"},
    "merge": NOUNS | {"formats"},
    "folding": LAYERS | {"objective", "formats", "merge"},
    "model": LAYERS | {"recipes", "objective", "formats", "folding"},
    "training": MODEL,
    "monitor": {"errors", "types", "delta", "rows", "objective", "model"},
    "serving": MODEL,
    "federated": MODEL,
    "runs": MODEL | {"training", "monitor", "serving", "federated", "__init__"},
    "cli": MODEL | {"training", "monitor", "runs", "serving", "federated", "__init__"},
    "__main__": {"cli"},
    "__init__": MODEL | {"training", "monitor", "federated"},
}
# the framework is known where models meet it, and in the applications
ONLY_IN = {
    "triton": {"kernels/triton/*.py"},
    "megablocks": {"kernels/megablocks.py"},
    "deepspeed": {"model/averaged.py", "formats/sharded.py"},
    "transformers": {
        "model/moa_model.py",
        "model/heads.py",
        "monitor/callback.py",
        "training/initialize_callback.py",
        "training/lisa_callback.py",
        "training/mosa_callback.py",
        "training/quantisation_callback.py",
        "training/squeeze_callback.py",
        "runs/*.py",
        "cli/main.py",
        "serving/vllm/registration.py",
    },
    "peft": {"nowhere"},
    "galore_torch": {"training/galore.py"},
    "vllm": {"serving/vllm/*.py"},
    "flwr": {"federated/flower.py"},
    "opacus": {"federated/private.py"},
    "datasets": {"runs/*.py", "cli/main.py"},
    "matplotlib": {"monitor/figures.py", "monitor/report.py"},
}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@cache
def imports(file: Path) -> tuple[frozenset[str], frozenset[str]]:
    """Return the rooms of moa that a file imports, anywhere in it, and the other packages."""
    tree = ast.parse(file.read_text())
    own, other = set(), set()
    package = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        found: set[str] = set()
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            if base or node.module:
                found = {(*base, *(node.module or "").split("."))[0]}
            else:
                found = {"__init__" if alias.name == "__version__" else alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            found, other = ({parts[1]}, other) if parts[0] == "moa" and parts[1:] else (set(), other | {parts[0]})
        elif isinstance(node, ast.Import):
            other |= {alias.name.split(".")[0] for alias in node.names}
        own |= found
    return frozenset(own), frozenset(other)


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_import_rule(file):
    me = part(file)
    assert me in ALLOWED, f"{name_of(file)} lies in no room: say in ALLOWED what {me} may import"
    wrong = imports(file)[0] - ALLOWED[me] - {me}
    assert not wrong, f"{name_of(file)} imports {sorted(wrong)}"
    for package, where in ONLY_IN.items():
        if package in imports(file)[1]:
            assert any(Path(name_of(file)).match(pattern) for pattern in where), f"{name_of(file)} imports {package}"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the names on a circle of a graph, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            found = visit(following, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def test_rooms_have_no_circle():
    """Lazy and typing imports counted."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        graph.setdefault(part(file), set()).update(imports(file)[0] - {part(file), "__init__"})
    assert not circle(graph), " -> ".join(circle(graph))


def test_files_have_no_circle():
    """Inside a room, too; a package's own __init__, which only gathers names, is not looked through."""
    graph = {module(file): targets(file) for file in FILES if file.name != "__init__.py"}
    assert not circle(graph), " -> ".join(circle(graph))


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def module(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


@cache
def targets(file: Path) -> set[str]:
    """Return the files of moa, dotted, that a file imports anywhere in it."""
    found = set()
    package = file.relative_to(PACKAGE).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *((node.module or "").split(".") if node.module else ()))
            found |= {".".join(base), *(".".join((*base, alias.name)) for alias in node.names)}
    return found & {module(f) for f in FILES}


def test_the_top_is_small():
    """The rooms can be said in one breath; no two files have one name, so a name says what is inside."""
    assert len([f for f in PACKAGE.iterdir() if f.is_file()]) <= 16
    names: dict[str, list[str]] = {}
    for file in FILES:
        if file.name != "__init__.py":
            names.setdefault(file.name, []).append(name_of(file))
    twice = {name: files for name, files in names.items() if len(files) > 1}
    assert not twice, twice


def test_the_import_rule_sees_a_wrong_import(tmp_path, monkeypatch):
    wrong = tmp_path / "moa" / "routers" / "bad.py"
    wrong.parent.mkdir(parents=True)
    wrong.write_text("from ..experts import LoRABank\nimport triton\ndef f():\n    from ..model import MoAModel\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "moa")
    assert imports(wrong) == ({"experts", "model"}, {"triton"})
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
from moa.mixture import Site
from moa.recipes import make_recipe
layer = torch.nn.Linear(4, 4).requires_grad_(False)
branches = make_recipe("topk", n_experts=3, k=2).build(Site("layer", layer, 4, 4))
moa.Mixture(layer, branches, moa.Context(), "layer")(torch.ones(2, 4)).sum().backward()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_dependency_is_imported_somewhere_and_says_what_for():
    text = (ROOT / "pyproject.toml").read_text()
    lines = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.S | re.M)[1].splitlines()
    imported = set().union(*(imports(file)[1] for file in FILES))
    names = {"pyyaml": "yaml"}
    unused_by_name = {"accelerate", "tensorboard"}  # Trainer and torch.utils.tensorboard import them
    for line in lines:
        name = re.match(r'\s*"([\w-]+)', line)[1]
        assert name in unused_by_name or names.get(name, name) in imported, f"{name} is declared and never imported"
        assert name == "torch" or "#" in line, f"{name}: say what for"
