"""Commands print through one function, and names are text. Run: pytest tests/cli/test_say.py"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import yaml

from moa.cli.main import main
from moa.errors import plain_text
from moa.runs.processes import say
from tests.tiny_run import config_values, write_jsonl

PACKAGE = Path(__file__).parents[2] / "moa"
FILES = sorted([*(PACKAGE / "cli").rglob("*.py"), *(PACKAGE / "runs").rglob("*.py")])
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
SAFE = "safe\u0301 ✓ 日本"  # letters, marks and signs that move nothing
HOSTILE = (
    "$a_$ \x1b[31m^{x",
    "line\nmoa train: done\rx",
    "../../x",
    "<script>document.title='run'</script>",
    "long" * 75,
    "\u202egnp.exe\u2066 \u200f\u061c",
    "/abs\\path: {0} %s #",
)


def printing(tree: ast.AST) -> list[int]:
    """Return the lines that print past `say`: a bare print, or a write to a stream of the process."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        bare = isinstance(called, ast.Name) and called.id == "print"
        inner = called.value if isinstance(called, ast.Attribute) and called.attr in ("write", "writelines") else None
        if bare or (isinstance(inner, ast.Attribute) and inner.attr in STREAMS):
            found.append(node.lineno)
    return found


def test_every_command_prints_through_say() -> None:
    assert printing(ast.parse("import sys\nprint(1)\nsys.stderr.write('x')")) == [2, 3]
    assert len(FILES) > 40
    for file in FILES:
        lines = printing(ast.parse(file.read_text()))
        allowed = 1 if file.name == "processes.py" else 0
        assert len(lines) == allowed, f"{file.relative_to(PACKAGE)}:{lines} prints past say"


@pytest.mark.parametrize("name", [*HOSTILE, SAFE])
def test_a_line_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    say(name, "second")
    first, second, rest = capsys.readouterr().out.split("\n")
    assert (second, rest) == ("second", "") and first.isprintable()
    assert first == name or name != SAFE
    say(name, error=True)
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_hostile_task_names_through_a_whole_run(
    tmp_path: Path, bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing leaves the run's folder, nothing steers the terminal, every file is there and opens."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    home = tmp_path / "home"
    home.mkdir()
    values = config_values(home, bases["encoder"])
    rows = values["tasks"]["first"] | {"max_train_rows": 4, "max_eval_rows": 4}
    values["tasks"] = dict.fromkeys(HOSTILE, rows)
    odd = [{"text": "it was", "label": f"\x1b[3{i % 2}m\n<b>"} for i in range(8)]
    values["tasks"][HOSTILE[0]] = {"train": str(write_jsonl(home / "\x1b[31m\n$b$.jsonl", odd))}
    values["recipe"] = {"router": "dense", "n_experts": 2, "rank": 2}
    values["training"] |= {"max_steps": 4, "save_steps": 4, "logging_steps": 2, "eval_strategy": "epoch"}
    config = home / "a.yaml"
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    run = home / "run"
    for words in (
        ["train", str(config), "--dry-run"],
        ["train", str(config)],
        ["eval", str(run)],
        ["report", str(run)],
        ["inspect", str(run)],
        ["predict", str(run), "--task", HOSTILE[1], "--data", rows["eval"], "--out", str(run / "x.jsonl")],
        ["predict", str(run), "--task", "\x1b[31m", "--data", rows["eval"], "--out", str(run / "y.jsonl")],
    ):
        capfd.readouterr()
        assert main(words) == (0 if HOSTILE[1] in words or "predict" not in words else 2), words
        said = "\n".join(capfd.readouterr())
        assert said.replace("\n", "").isprintable(), words
        if words[0] in ("train", "eval"):
            for name in HOSTILE:
                assert plain_text(name[:9]) in said, name
    new = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert all(file.is_relative_to(run) and str(file).isprintable() for file in new)
    assert {"results.json", "routing.png", "report.html", "x.jsonl"} <= {file.name for file in new}
    assert list(json.loads((run / "results.json").read_text())["scores"]["mixture"]) == list(HOSTILE)
    page = (run / "report.html").read_text()
    assert "<script" not in page and not set(page) & {"\x1b", "\u202e"}
    tags = [
        tag
        for folder in {file.parent for file in new if "tfevents" in file.name}
        for tag in EventAccumulator(str(folder)).Reload().Tags()["scalars"]
    ]
    assert tags and all(tag.isprintable() for tag in tags)
