"""What the documents say is so: public names, docstrings, tables, snippets. Run: pytest tests/test_docs.py"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import moa
from experiments import table_text, tables
from moa.experts import FAMILIES
from moa.merge import METHODS
from moa.recipes import RECIPES, make_recipe
from moa.routers import ROUTERS
from tests.test_imports import ALLOWED, NOUNS, ONLY_IN

ROOT = Path(__file__).parents[1]
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
    assert len(moa.__all__) == len(set(moa.__all__)) <= 32
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


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of every row whose first one is code, the headers left out."""
    rows = re.findall(r"^\| (`.*) \|$(?!\n\|[ -]*--)", text, re.M)
    return [row.split(" | ") for row in rows]


def test_readme_names_the_ways_in() -> None:
    text = text_of("README.md")
    for name in ("build", "load", "RoutingMonitor", "export_expert", "make demo", "make test", "pip install"):
        assert name in text
    first = next(iter(snippets("README.md", "python")))
    assert len([line for line in first.splitlines() if line]) <= 9, "eight lines and an import"


def test_recipes_are_listed_with_their_words_and_source() -> None:
    rows = {row[0]: row[1:] for row in rows_of(text_of("docs/recipes.md"))}
    for name, recipe in RECIPES.items():
        if not recipe.__module__.startswith("moa."):
            continue
        row = rows.pop(f"`{name}`", None)
        first = (inspect.getdoc(recipe) or "").splitlines()[0]
        wanted = [first, recipe.paper, make_recipe(name).folds]
        assert row is not None and row[:3] == wanted, (
            f"docs/recipes.md must hold: | `{name}` | {' | '.join(wanted)} | [its test](…) |, and has {row}"
        )
    assert not rows, f"docs/recipes.md lists {list(rows)}, which are no recipes"


def test_merging_methods_are_listed_with_their_definition_and_source() -> None:
    rows = {row[0]: row[1:] for row in rows_of(text_of("docs/merging.md"))}
    for name, method in METHODS.items():
        row = rows.pop(f"`{name}`", None)
        assert row == [method.definition, method.paper], (
            f"docs/merging.md must hold: | `{name}` | {method.definition} | {method.paper} |, and has {row}"
        )
    assert not rows, f"docs/merging.md lists {list(rows)}, which are no methods"


def test_which_recipe_names_recipes() -> None:
    part = text_of("README.md").partition("## Which recipe do I want?")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in part.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 7
    for row in rows:
        named = re.findall(r"`(\w+)`", row[2])
        assert named and set(named) <= set(RECIPES), row


def test_the_tree_names_the_rooms() -> None:
    """Exactly the folders of moa, and exactly its nouns."""
    tree = text_of("README.md").partition("## The tree")[2].partition("## ")[0]
    nouns, rooms = re.findall(r"^  (\w[\w ]+?) {2,}", tree, re.M), re.findall(r"^  (\w+)/ ", tree, re.M)
    assert rooms == [room for room in ALLOWED if room in rooms], "in the order of imports"
    assert set(rooms) == {path.parent.name for path in (ROOT / "moa").glob("*/__init__.py")}
    assert [set(line.split()) for line in nouns] == [NOUNS]
    files = {path.stem for path in (ROOT / "moa").glob("*.py")}
    assert files == NOUNS | {"__init__", "__main__"}
    for folder in re.findall(r"^(\w+)/ ", tree, re.M):
        assert (ROOT / folder).is_dir(), folder


def test_the_order_of_rooms_is_that_of_the_import_test() -> None:
    text = text_of("CONTRIBUTING.md")
    line = " ".join(re.findall(r"^    (nouns ←.*\n(?:    .*\n)*)", text, re.M)).split("←")
    order = [{room.strip() for room in place.split(",")} for place in line]
    assert order[0] == {"nouns"}
    place = {room: at for at, rooms in enumerate(order) for room in rooms}
    assert sum(map(len, order)) == len(place), "a room stands once"
    rooms = {room: seen - NOUNS for room, seen in ALLOWED.items() if room not in NOUNS | {"__init__", "__main__"}}
    assert set(place) == {"nouns", *rooms}
    less = dict(re.findall(r"^- `(\w+)` sees only (.*)\.$", text, re.M))
    assert less
    for room, seen in rooms.items():
        left = {other for other in rooms if place[other] < place[room]}
        assert seen - {"__init__"} <= left, f"{room} imports {seen - left}, which do not stand to its left"
        if room in less:
            named = set(re.findall(r"`(\w+)`", less[room])) | (NOUNS if "nouns" in less[room] else set())
            assert named == ALLOWED[room], f"{room} may import {sorted(ALLOWED[room])}"
        else:
            kept = left - seen - UNSAID
            assert not kept, f"{room} may not import {kept}: say what it sees only"


UNSAID = {"merge"}  # whoever may import folding seldom needs it


def test_the_packages_are_where_contributing_says() -> None:
    rows = {row[0]: set(re.findall(r"`([^`]+)`", row[1])) for row in rows_of(text_of("CONTRIBUTING.md"))}
    assert rows == {f"`{package}`": where for package, where in ONLY_IN.items() if where != {"nowhere"}}


def test_tables_are_those_of_the_results() -> None:
    pages = [path.read_text(encoding="utf-8") for path in tables.PAGES]
    for page in pages:
        assert tables.filled(page) == page, "python -m experiments.tables"
    assert set(re.findall(r"<!-- (\w+) -->", "".join(pages))) == {*tables.TABLES, "end"}
    assert tables.filled("<!-- around -->\n| 9.9 |\n<!-- end -->") != "<!-- around -->\n| 9.9 |\n<!-- end -->"


def test_every_result_says_how_it_was_made() -> None:
    """Command, device, versions and commit, as a page that quotes it promises."""
    files = sorted((ROOT / "experiments" / "results").glob("*.json"))
    assert len(files) > 10
    for file in files:
        found = tables.result(file.stem)
        environment = found.get("environment", found)
        assert {"device", "python", "torch", "commit"} <= environment.keys(), file.name
        assert found.get("command", table_text.COMMANDS.get(file.stem)), file.name


def test_the_claim_is_in_the_results() -> None:
    text = text_of("README.md")
    step = tables.result("step")
    ratios = step["shapes"]["16 x 32, threads 1"]
    for peer, words in (
        ("peft X-LoRA 8x8", "is {} × as fast as with peft's X-LoRA"),
        ("peft LoRA r64", "is {} × as fast"),
    ):
        assert words.format(f"{1 / ratios[peer]['moa_over_this']:.2f}") in text
    assert f"`{step['command']}` at {step['environment']['commit']}" in text


def test_what_readme_says_of_the_demo_is_in_its_result() -> None:
    text = " ".join(
        text_of("README.md").partition("The first three rows follow")[2].partition("[All recipes]")[0].split()
    )
    found = tables.result("demo")
    assert f"--seeds {found['seeds']}`" in text
    said = re.findall(r"[+-]\d+\.\d ± \d+\.\d", text)
    order = [("A", arm, "LoRA") for arm in ("poly", "topk", "remix")]
    order += [("B", "poly", "LoRA"), ("B", "poly", "LoRA, told"), ("B", "topk", "LoRA"), ("B", "remix", "LoRA")]
    minus = [found["settings"][setting][arm]["minus"][other] for setting, arm, other in order]
    assert said == [f"{100 * one['mean']:+.1f} ± {100 * one['half']:.1f}" for one in minus]
    sides = [abs(one["mean"]) > one["half"] for one in minus]
    assert sides == [False, False, False, True, False, False, False], "the words of the table no longer follow"


PAGES = [
    "SECURITY.md",
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)", text_of(page)):
        assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs" / "load.png").stat().st_size < 150_000


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page, "python")])
def test_snippets_run(page: str, tmp_path: Path) -> None:
    """Those of a page in a fresh process and an empty folder, as a reader would; then its lines `moa …`."""
    for text in snippets(page, "yaml"):
        (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
    shell = [line.split() for text in snippets(page, "bash") for line in text.splitlines() if line.startswith("moa ")]
    calls = [["-c", "\n".join(snippets(page, "python"))], *(["-m", *words] for words in shell)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for call in calls:
        done = subprocess.run(
            [sys.executable, *call], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
        )
        assert done.returncode == 0, f"{call[-1]}\n{done.stderr[-3000:]}"


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


NOT_A = re.compile(r"(?<!\bthere )\b(?:is|are|was|were) no (?!longer|more\b|less\b)", re.I)
PROSE_OF = (".", *sorted(path.parent.name for path in (ROOT / "moa").glob("*/__init__.py")))
# what others call the arguments that CONTRIBUTING names
OTHER_NAMES = {"num_experts", "top_k", "lora_rank", "lora_alpha", "in_features", "out_features", "target_modules"}


def prose_of(source: str) -> list[str]:
    """Return the docstrings and comments of a file, each on one line."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, owners)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [" ".join(text.split()) for text in docs + [t.string for t in tokens if t.type == tokenize.COMMENT]]


@pytest.mark.parametrize("room", PROSE_OF)
def test_prose_says_what_something_is_not(room: str) -> None:
    """ "It is not a LoRA", never "it is no LoRA"; "there is no LoRA" is plain English."""
    for path in (ROOT / "moa" / room).glob("*.py" if room == "." else "**/*.py"):
        for text in prose_of(path.read_text(encoding="utf-8")):
            found = NOT_A.search(text)
            assert found is None, f"{path.relative_to(ROOT)}: say 'is not a': {text[: found.end() + 40]}"


def test_bad_prose_is_recognised() -> None:
    for bad in ('"""It is no LoRA."""', "# rows that are no\nx = 1  # part are no part"):
        assert any(NOT_A.search(text) for text in prose_of(bad)), bad
    for good in ("# there is no LoRA", "# it is no longer used", "# it is not a LoRA", "x = 'is no LoRA'"):
        assert not any(NOT_A.search(text) for text in prose_of(good)), good


@pytest.mark.parametrize("room", ["routers", "experts"])
def test_what_returns_tensors_gives_their_shapes(room: str) -> None:
    for path in (ROOT / "moa" / room).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name == "__call__" or node.returns is None:
                continue
            public = not node.name.startswith("_")
            if public and re.search(r"\b(?:Tensor|Routing)\b", ast.unparse(node.returns)):
                doc = ast.get_docstring(node) or ""
                assert SHAPE.search(doc), f"{path.relative_to(ROOT)}: {node.name} names no shape: {doc!r}"


def test_arguments_have_the_names_of_contributing() -> None:
    words = text_of("CONTRIBUTING.md").partition("Arguments are always ")[2].partition(".")[0]
    named = set(re.findall(r"`(\w+)`", words))
    assert {"n_experts", "k", "rank", "alpha", "d_in", "d_out", "targets"} <= named and not named & OTHER_NAMES
    for path in (ROOT / "moa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                taken = {a.arg for a in node.args.args + node.args.kwonlyargs} & OTHER_NAMES
                assert not taken, f"{path.relative_to(ROOT)}: {node.name} calls its arguments {taken}"
