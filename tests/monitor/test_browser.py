"""The page in a headless browser, as a person sees it. Run: pytest tests/monitor/test_browser.py"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from moa.monitor.report import report
from moa.monitor.runlog import LogStep, RunLog
from moa.monitor.statistics import LayerLoad

BROWSER = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
HOSTILE = "$a_$ <script>document.title='run'</script> \x1b[31mred \u202egnp.exe\nbreak a/b " + "long" * 60
SHOWN = "$a_$ <script>document.title='run'</script> \\x1b[31mred \\u202egnp.exe\\nbreak a/b " + "long" * 60
MEASURE = """<script>addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth, seen = innerWidth;
  const top = (what) => { const e = document.querySelector(what); return e ? e.getBoundingClientRect().top : -1; };
  document.title = JSON.stringify({wide, seen, scores: top("table"), figure: top("img"), dump: top("details")});
});</script>"""


def hostile_run(folder: Path) -> Path:
    """Write a run whose task, layer and values are named to break a page."""
    log = RunLog(folder, folder / "runs", 0, [], detailed=False, images=True)
    for step in (1, 2):
        layers = {f"{HOSTILE}.{i}": LayerLoad(torch.softmax(torch.randn(8), 0).double(), 9.0, 2) for i in range(3)}
        by_task = {HOSTILE: {name: layer.load for name, layer in layers.items()}}
        log.write(LogStep(step, layers, by_task, {"task": 1.0}, 0.1, [HOSTILE]))
    log.close()
    scores = {model: {HOSTILE: {"accuracy": 0.5, "loss": 0.7}} for model in ("before", "mixture")}
    results = {"scores": scores, "routing": {HOSTILE: {"effective_fraction": 0.25}}, "base": HOSTILE}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_hostile_names_are_text(tmp_path: Path) -> None:
    page = report(hostile_run(tmp_path)).read_text(encoding="utf-8")
    assert "<script" not in page and not set(page) & {"\x1b", "\u202e"}
    assert page.count(html.escape(SHOWN)) > 8
    assert "routing used at inference, exp(H)/E of the load on the evaluation rows: mean 25.0 %" in page


@pytest.mark.skipif(BROWSER is None, reason="no chromium here: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_runs_over_and_figures_come_first(tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    page = report(hostile_run(tmp_path))
    measured = tmp_path / "measured.html"
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    picture = tmp_path / "page.png"
    common = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    common += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1500"]
    words = [*common, f"--screenshot={picture}", "--dump-dom", measured.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stderr[-500:]
    seen = json.loads(html.unescape(title[1]))
    assert seen["wide"] <= seen["seen"], seen
    assert 0 < seen["scores"] < seen["figure"] < seen["dump"], seen
    assert seen["scores"] < 1500  # on the first screen
