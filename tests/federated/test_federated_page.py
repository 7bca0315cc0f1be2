"""The page of federated training is run as it stands. Run: pytest tests/federated"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from moa.federated import AGGREGATORS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "federated.md").read_text(encoding="utf-8")


def test_the_table_is_the_code_s() -> None:
    rows = {
        m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", PAGE.partition("<!-- federated -->")[0], re.MULTILINE)
    }
    assert list(rows) == ["fedit", "zero_pad", "flexlora", "flora", "fedex", "ffa", "fedsb"]
    assert rows.keys() == AGGREGATORS.keys()
    for name, row in rows.items():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:4] == ["yes" if x else "no" for x in (AGGREGATORS[name].exact, AGGREGATORS[name].ranks)], name


@pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="no opacus here")
@pytest.mark.filterwarnings("ignore:Optimal order is the")
def test_every_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    space: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/federated.md", "exec"), space)
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("('ward a', 'ward b') {} ()") and len(out) == 3


def test_commands_and_apps_are_there() -> None:
    commands = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert "make env-flower" in commands[0] and "env-flower:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    module = re.search(r"-m ([\w.]+)", commands[0])
    assert module is not None and (ROOT / module[1].replace(".", "/") / "__main__.py").is_file()
    (app,) = re.findall(r"^```python flower\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    source = ast.parse((ROOT / "moa" / "federated" / "flower.py").read_text(encoding="utf-8"))
    known = {node.name for node in source.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    wanted = re.search(r"from moa.federated.flower import (.*)", app)
    assert wanted is not None and set(wanted[1].split(", ")) <= known
