"""Recipes and adapter families as their files declare them, read without torch: names, keywords, types, defaults."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .yaml_values import is_file

PACKAGE = Path(__file__).parents[1]
TABLES = {"register_recipe": "recipes", "register_expert": "experts"}  # decorator -> room whose files have such rows
PLAIN: dict[str, Any] = {
    **{plain.__name__: plain for plain in (bool, int, float, str, tuple, list, dict)},
    **{name: getattr(typing, name) for name in ("Any", "ClassVar", "Literal")},
    "Mapping": Mapping,
    "Sequence": Sequence,
}


@cache
def written_rows(decorator: str) -> dict[str, type]:
    """Return name -> row for every class under a decorator of TABLES: a dataclass of the same fields, without methods.

    A row knows its `name` and what its class declares (`places`, `unused`, …). Empty where the sources are not there.
    """
    rows: dict[str, type] = {}
    for file in sorted((PACKAGE / TABLES[decorator]).rglob("*.py")):
        for node in _statements(file).values():
            calls = [c for c in getattr(node, "decorator_list", ()) if isinstance(c, ast.Call)]
            for call in calls:
                if isinstance(node, ast.ClassDef) and ast.unparse(call.func) == decorator:
                    row = _shell(file, node.name)
                    row.name = ast.literal_eval(call.args[0])  # type: ignore[attr-defined]
                    rows[row.name] = row  # type: ignore[attr-defined]
    return rows


@cache
def _statements(file: Path) -> dict[str, ast.stmt]:
    """Return what the top level of a file defines or imports, by name."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


class _Names(dict[str, Any]):
    """The names that a file knows, each looked up when it is asked for: plain types, its constants, its dataclasses."""

    def __init__(self, file: Path) -> None:
        super().__init__(PLAIN)
        self.file = file

    def __missing__(self, name: str) -> Any:
        return _named(self.file, name)


@cache
def _named(file: Path, name: str) -> Any:
    node = _statements(file).get(name)
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
        return _value(file, node.value)
    if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        return _shell(file, name)
    if isinstance(node, ast.ImportFrom) and node.level:
        place = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        source = next((f for f in (place.with_suffix(".py"), place / "__init__.py") if is_file(f)), None)
        original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        if source is not None:
            return _named(source, original)
    raise NameError(name)  # what only torch or a function can say


def _value(file: Path, node: ast.expr) -> Any:
    """Return what an expression of one of our own files comes to.

    Raises:
        NameError: it needs more than plain values.
    """
    code = compile(ast.fix_missing_locations(ast.Expression(node)), str(file), "eval")
    return eval(code, {"__builtins__": {}}, _Names(file))


@cache
def _shell(file: Path, name: str) -> type:
    """Return a dataclass with the fields and class variables that a class of a file declares, its bases' included."""
    node = _statements(file)[name]
    assert isinstance(node, ast.ClassDef)
    fields, constants = [], {}
    for key, annotation, value in _declared(node):
        if annotation is None or ast.unparse(annotation).startswith("ClassVar"):
            constants[key] = _or_else(file, value, None)
        else:
            default = dataclasses.field(default=_or_else(file, value, None))
            fields.append((key, _or_else(file, annotation, Any), default))
    bases = tuple(_value(file, base) for base in node.bases)
    return dataclasses.make_dataclass(name, fields, bases=bases, namespace=constants, frozen=True, kw_only=True)


def _declared(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr | None, ast.expr | None]]:
    """Yield name, annotation and value of every variable in a class's body."""
    for row in node.body:
        if isinstance(row, ast.AnnAssign) and isinstance(row.target, ast.Name):
            yield row.target.id, row.annotation, row.value
        elif isinstance(row, ast.Assign) and isinstance(row.targets[0], ast.Name):
            yield row.targets[0].id, None, row.value


def _or_else(file: Path, node: ast.expr | None, other: Any) -> Any:
    """Return what an expression comes to, or another value where that takes more than plain values."""
    try:
        return other if node is None else _value(file, node)
    except NameError:
        return other
