"""The measurement of a GPU, gone through without one. Run: pytest tests/systems/test_gpu_rehearsal.py"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
import weakref
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.gpu import __main__ as command
from experiments.gpu import pretended, tiles, warm
from experiments.gpu.__main__ import SECTIONS, has_driver, main, unpacked
from experiments.gpu.book import Book, Lost, Row
from experiments.gpu.machine import Machine, over
from experiments.gpu.pack import pack
from experiments.gpu.page import goal, page
from experiments.gpu.rehearsal import failures
from experiments.gpu.shapes import ENGINES, SANITIZED

ROOT = Path(__file__).parents[2]


def rehearse(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Return what a rehearsal wrote and printed."""
    called = [sys.executable, "-W", "ignore", "-m", "experiments.gpu", "--out", str(out), "--rehearse", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(called, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    file = out / "gpu.json"
    return json.loads(file.read_text()) if file.exists() else {}, done.stdout


def test_every_way_through_the_sections(tmp_path):
    """One row of each kind; the warm-up compiles for a GPU, the rest runs in the interpreter."""
    content, said = rehearse(tmp_path, "quick", "--seconds", "600")
    failing = content["sections"].pop("failures")
    assert "error" in failing["raises"]
    assert list(content["sections"]) == [section.name for section in SECTIONS]
    for section, rows in content["sections"].items():
        assert rows, section
        for name, row in rows.items():
            assert "error" not in row, f"{section}, {name}: {row['error']}"
            assert row["found"].get("holds", True), f"{section}, {name}: {row['found']}"
    assert not any(left for section, left in content["left over"].items() if section != "failures")
    assert "under way" not in content
    for wanted in ("## Goals", "## Times", "moa / frozen base", "Sizes(", "_GPU_COLUMNS", "DIRECT = "):
        assert wanted in said


def test_rows_that_fail_leave_the_rest_be(tmp_path):
    """One raises, one hangs, one ends its process, one loses the device, and one has no time."""
    content, said = rehearse(tmp_path, "quick", "--seconds", "60", "--only", "failures")
    rows = content["sections"]["failures"]
    assert rows["raises"]["error"].startswith("ValueError: as it should")
    assert "ran for more than" in rows["hangs"]["error"]
    assert rows["ends the process"]["error"] == "the process ended with code 17"
    assert "illegal memory access" in rows["loses the device"]["error"]
    assert rows["is well"]["found"] == {"answer": 42}
    assert content["left over"]["failures"] == ["has no time"]
    assert content["processes lost"] == {"failures": 3}
    assert "for want of time: 1 rows" in said and said.count("**failed**") == 4


def test_no_time_at_all_is_said(tmp_path):
    content, said = rehearse(tmp_path, "quick", "--seconds", "0", "--only", "failures", "--cache", "nowhere.tgz")
    assert not content and "# moa on one GPU" in said and "nowhere.tgz is not here" in said


@pytest.mark.skipif(has_driver(), reason="there is a CUDA driver")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    main(["--out", str(tmp_path / "none")])
    assert "not measured: there is no CUDA driver here" in capsys.readouterr().out
    assert not list((tmp_path / "none").iterdir())


def test_a_run_is_taken_up_where_it_ended(tmp_path):
    ran = []

    def row(name: str, seconds: float = 1.0) -> Row:
        return Row(name, lambda: ran.append(name), seconds)

    book = Book(tmp_path / "gpu.json")
    assert book.run("s", [row("one"), row("long", 1e9)], deadline=2e9) == ["long"]
    assert Book(tmp_path / "gpu.json").run("s", [row("one"), row("two")], deadline=2e9) == []
    assert ran == ["one", "two"]


@pytest.mark.parametrize("lost, order", [(2, ["a", "b"]), (3, ["b", "a"])])
def test_a_section_that_costs_processes_waits_for_the_others(tmp_path, monkeypatch, lost, order):
    ran: list[str] = []

    def rows(section: command.Section, *_: Any) -> Iterator[Row]:
        yield Row("row", lambda: ran.append(section.name))

    monkeypatch.setattr(command, "sections", lambda _: [command.Section("a", 1), command.Section("b", 1)])
    monkeypatch.setattr(command, "rows_of", rows)
    book = Book(tmp_path / "gpu.json")
    book.content |= {"environment": {}, "processes lost": {"a": lost}}
    command.work(Namespace(until=time.time() + 1000, rehearse=None, only=None), book)
    assert ran == order


def test_what_rows_hold_is_given_back_where_the_device_is_lost(tmp_path, monkeypatch):
    closed: list[str] = []

    def loses() -> None:
        raise RuntimeError("Triton Error [CUDA]: an illegal instruction was encountered")

    def rows(section: command.Section, *_: Any) -> Iterator[Row]:
        try:
            yield Row("loses", loses)
        finally:
            closed.append(section.name)

    monkeypatch.setattr(command, "sections", lambda _: [command.Section("a", 1)])
    monkeypatch.setattr(command, "rows_of", rows)
    book = Book(tmp_path / "gpu.json")
    book.content["environment"] = {}
    with pytest.raises(Lost) as kept:  # its frames are alive, as they are while a process ends
        command.work(Namespace(until=time.time() + 1000, rehearse=None, only=None), book)
    assert closed == ["a"] and kept.value and book.content["processes lost"] == {"a": 1}


@pytest.mark.parametrize("name", [name for name in vars(pretended.Cuda) if not name.startswith("_")])
def test_the_pretended_device_has_the_calledof_the_real_one(name):
    mine, real = getattr(pretended.Cuda, name), getattr(torch.cuda, name)
    if inspect.isclass(mine):
        pairs = [(n, getattr(mine, n), getattr(real, n)) for n in vars(mine) if not n.startswith("_")]
        pairs.append(("__new__", mine.__new__, real.__init__ if name == "graph" else real.__new__))
    else:
        pairs = [(name, mine, real.__init__ if inspect.isclass(real) else real)]
    for what, own, theirs in pairs:
        try:
            known = inspect.signature(theirs).parameters
        except ValueError:  # written in C
            continue
        if any(p.kind is p.VAR_POSITIONAL for p in known.values()):
            continue
        for parameter in inspect.signature(own).parameters.values():
            if parameter.name not in ("self", "cls") and parameter.kind is not parameter.VAR_KEYWORD:
                assert parameter.name in known, f"torch.cuda.{name}, {what}: it has no {parameter.name}"


def test_everything_asked_of_the_device_is_pretended():
    source = inspect.getsource(Machine)
    asked = {part.split("(")[0].split(" ")[0].rstrip(":") for part in source.split("self.cuda.")[1:]}
    assert asked <= set(vars(pretended.Cuda)), asked


def test_a_graph_refuses_what_waits_for_the_device():
    machine = pretended.Rehearsal()
    x = torch.arange(3.0)
    captured = machine.capture(lambda: x * 2)
    x += 1
    captured.replay()
    assert captured.output.tolist() == [2.0, 4.0, 6.0]
    with pytest.raises(RuntimeError, match="waits for the device"):
        machine.capture(lambda: x * float(x.sum()))


def test_what_a_graph_reads_is_kept():
    """A replay reads the memory of a model that nothing else holds."""
    weight = torch.ones(3)
    kept = weakref.ref(weight)
    captured = Machine.captured(pretended.Rehearsal(), None, torch.zeros(3), lambda weight=weight: weight, False)
    del weight
    assert kept() is not None and captured.output.shape == (3,)


def test_a_row_that_the_end_cut_off_is_run_by_another_call(tmp_path):
    book = Book(tmp_path / "gpu.json")
    book.begin("s", Row("cut", lambda: None))
    book.cut("s", "cut")
    text = page(book.content)
    assert "not measured, for want of time: 1 rows (cut)" in text
    again = Book(tmp_path / "gpu.json")
    assert again.run("s", [Row("cut", lambda: 7)], deadline=2e9) == [] and again.rows("s")["cut"]["found"] == 7


def test_times_are_compared_and_goals_judged():
    times = pretended.Rehearsal().compare({"one": lambda: None, "other": lambda: None})
    assert times["one"]["median_ms"] >= 0 and times["one"]["rounds"] == 1
    assert over({"a": {"median_ms": 3.0}, "b": {"median_ms": 2.0}}, "a", "b") == 1.5
    assert over({"a": {"median_ms": 3.0}, "b": {"error": "out of memory"}}, "a", "b") is None
    assert goal("r", 1.3, at_most=1.25)["holds"] is False and goal("r", 1.5, at_least=1.3)["holds"] is True
    text = page({"sections": {"s": {"r": {"found": {"goals": [goal("g", None, at_most=1)]}, "seconds": 1}}}})
    assert "| r: g | not measured | ≤ 1 |" in text


def test_a_step_that_fails_leaves_the_others_be():
    def fails() -> None:
        raise ValueError("no kernel for it\nand more")

    times = pretended.Rehearsal().compare({"fails": fails, "well": lambda: None})
    assert times["fails"] == {"error": "no kernel for it"} and times["well"]["median_ms"] >= 0

    def loses() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        pretended.Rehearsal().compare({"loses": loses, "well": lambda: None})


def test_tiles_that_cannot_be_launched_are_said(monkeypatch):
    def no_room(*_: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tiles, "with_sizes", no_room)
    with pytest.raises(RuntimeError, match="no tiles of expand can be launched; out of resource"):
        tiles.sweep_rows(pretended.Rehearsal(), "expand")


def test_what_the_sanitizer_runs_is_compiled_before():
    """Under the sanitizer compiling takes its time."""
    compiled = {(job.what, job.shape) for job in warm.jobs()}
    assert {(engine, shape) for engine in ENGINES for shape in SANITIZED} <= compiled


def test_a_rehearsal_says_what_failed(tmp_path):
    book = Book(tmp_path / "gpu.json")
    well, wrong = Row("well", lambda: {"holds": True}), Row("wrong", lambda: {"holds": False})
    book.content["left over"] = {"s": book.run("s", [well, wrong, Row("raises", lambda: 1 / 0)], deadline=2e9)}
    book.content["left over"]["t"] = ["late"]
    book.run("failures", [Row("as it should", lambda: 1 / 0)], deadline=2e9)
    found = failures(book)
    assert [line.split(":")[0] for line in found] == ["s, wrong", "s, raises", "t"]
    assert "ZeroDivisionError" in found[1]


def test_compiled_kernels_travel(tmp_path):
    kernel = tmp_path / "cache" / "HASH" / "kernel.cubin"
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"code")
    assert pack(tmp_path / "cache", tmp_path / "there" / "kernels.tgz") > 0
    folder = unpacked(tmp_path / "there" / "kernels.tgz", tmp_path / "out")
    assert Path(folder, "HASH", "kernel.cubin").read_bytes() == b"code" and Path(folder).parent == tmp_path
