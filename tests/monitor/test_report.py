"""The page and the table of a run. Run: pytest tests/monitor/test_report.py"""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from moa.errors import ConfigError
from moa.monitor.report import load_bars, report, routing_table
from moa.monitor.runlog import LogStep, RunLog
from moa.monitor.statistics import LayerLoad


def run(folder: Path, steps: int = 3, tasks: bool = True, warning: str | None = None) -> Path:
    log = RunLog(folder, folder / "runs", 0, [], detailed=False, images=False)
    torch.manual_seed(0)
    for step in range(1, steps + 1):
        layers = {
            f"encoder.layer.{i}.<b>": LayerLoad(torch.softmax(2 * torch.randn(8), 0).double(), 500.0, 2)
            for i in range(4)
        }
        by_task = {t: {n: v.load for n, v in layers.items()} for t in ("news & films", "mail")} if tasks else {}
        told = [warning] if warning and step == 2 else []
        log.write(LogStep(10 * step, layers, by_task, {"task": 3.0 / step, "balance": 0.01}, 0.1, told))
    log.close()
    return folder


class Page(HTMLParser):
    """Collects tags, addresses and text, and checks that tags close."""

    void = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_everything_and_needs_nothing(tmp_path: Path) -> None:
    path = report(run(tmp_path, warning="the routing of layer 3 has collapsed <&>"))
    assert path == tmp_path / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "link" not in page.tags
    assert page.sources and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not re.search(r"https?://", source)
    for picture in page.sources:
        image = Image.open(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
        image.load()
        assert image.width > 200 and len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    assert len(page.sources) == 4
    for words in (
        "4 layers after 30 optimizer steps",
        "encoder.layer.3.<b>",
        "Step 20: the routing of layer 3 has collapsed <&>",
        "optimizer steps 21 to 30",
        "Load per task",
    ):
        assert words in page.text
    assert page.tags.count("i") == 4 * 8


def test_values_in_the_table_are_those_of_the_log(tmp_path: Path) -> None:
    folder = run(tmp_path)
    page = Page(report(folder).read_text(encoding="utf-8"))
    last = json.loads((folder / "routing.jsonl").read_text().splitlines()[-1])
    for layer in last["layers"].values():
        assert f"{layer['effective_experts']:.2f}" in page.text
        assert f"{100 * layer['largest_share']:.1f} %" in page.text


def test_without_tasks_or_warnings_or_a_second_step(tmp_path: Path) -> None:
    page = Page(report(run(tmp_path, steps=1, tasks=False)).read_text(encoding="utf-8"))
    assert "Load per task" not in page.text and "No layer collapsed." in page.text
    assert "optimizer steps 1 to 10" in page.text


def test_trainer_state_and_results_are_shown(tmp_path: Path) -> None:
    folder = run(tmp_path)
    plain = report(folder).read_text(encoding="utf-8")
    for step, loss in ((2, 9.0), (10, 5.0)):
        (folder / f"checkpoint-{step}").mkdir()
        state = {
            "log_history": [{"step": 1, "loss": loss}, {"step": step, "loss": 1.0}, {"step": step, "eval_loss": 2.0}]
        }
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "results.json").write_text(json.dumps({"accuracy": {"news": 0.81234, "mail": 1}, "note": "<x>"}))
    page = Page(report(folder).read_text(encoding="utf-8"))
    assert "0.8123" in page.text and "<x>" in page.text
    newest = page.sources[2]
    assert newest not in plain
    (folder / "checkpoint-2" / "trainer_state.json").unlink()
    assert Page(report(folder).read_text(encoding="utf-8")).sources[2] == newest


def test_folders_without_a_run_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        report(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"holds no run: routing.jsonl is missing"):
        report(tmp_path)
    run(tmp_path / "inner")
    with pytest.raises(ConfigError, match=r"Did you mean .*inner\?"):
        report(tmp_path)
    (tmp_path / "routing.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no log step yet"):
        report(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("results.json", '{"a": ', "is not valid JSON"),
        ("trainer_state.json", "[", "is not valid JSON"),
        ("trainer_state.json", "{}", "no log_history"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str, words: str) -> None:
    folder = run(tmp_path)
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=f"{name} .*{words}"):
        report(folder)


def test_load_bars() -> None:
    assert load_bars(torch.full((4,), 0.25)) == "▄▄▄▄"
    assert load_bars(torch.tensor([1.0, 0.0, 0.0, 0.0])) == "█   "
    assert load_bars(torch.tensor([0.5, 0.499, 0.001, 0.0])) == "██▁ "


def test_routing_table_lines_up() -> None:
    layers = {
        "a": LayerLoad(torch.tensor([0.25] * 4), 10.0, 2),
        "encoder.1.dense": LayerLoad(torch.tensor([0.5, 0.5, 0.0, 0.0]), 10.0, 2),
    }
    head, first, second = routing_table(layers).splitlines()
    assert first.split() == ["a", "4.00/4", "25.0%", "0%", "|▄▄▄▄|"]
    assert second.split() == ["encoder.1.dense", "2.00/4", "50.0%", "50%", "|██", "|"]
    assert head.index("load") == first.index("|") == second.index("|")
