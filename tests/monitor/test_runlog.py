"""The files of a run read back. Run: pytest tests/monitor/test_runlog.py"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from moa.errors import ConfigError
from moa.monitor.runlog import LogStep, RunLog, read_log
from moa.monitor.statistics import LayerLoad


def log_step(step: int, loss: float = 1.5, grad_norm: float | None = 0.5) -> LogStep:
    layers = {
        "a.0": LayerLoad(torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), 12.0, 2),
        "a.1": LayerLoad(torch.tensor([0.9, 0.1], dtype=torch.float64), 12.0, None, dead_share=0.3),
    }
    by_task = {"news": {"a.0": torch.tensor([1.0, 0, 0], dtype=torch.float64)}}
    return LogStep(step, layers, by_task, {"task": loss}, grad_norm, ["something"])


def write(folder: Path, *steps: int, start: int = 0) -> None:
    log = RunLog(folder, folder, start, ["a.0", "a.1"], detailed=False, images=False)
    for step in steps:
        log.write(log_step(step))
    log.close()


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    first, second = read_log(tmp_path / "routing.jsonl")
    want = log_step(2)
    assert (first.step, second.step) == (1, 2)
    assert second.losses == want.losses and second.router_grad_norm == 0.5 and second.warnings == ["something"]
    for name, layer in want.layers.items():
        assert torch.equal(second.layers[name].load, layer.load)
        assert second.layers[name].measures() == layer.measures()
        assert second.layers[name].k == layer.k
    assert torch.equal(second.by_task["news"]["a.0"], want.by_task["news"]["a.0"])


def test_lines_hold_every_measure_for_other_readers(tmp_path: Path) -> None:
    write(tmp_path, 1)
    row = json.loads((tmp_path / "routing.jsonl").read_text())
    assert row["layers"]["a.0"]["load_entropy"] == pytest.approx(1.5 * math.log(2))
    assert row["layers"]["a.0"]["effective_experts"] == pytest.approx(2**1.5)
    assert row["layers"]["a.0"]["largest_share"] == 0.5
    assert row["layers"]["a.1"]["dead_fraction"] == 0.5


def test_heat_maps_come_ever_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(RunLog, "_png", lambda self, step, panels: drawn.append(step.step) or (1, 1, b""))
    log = RunLog(tmp_path, tmp_path, 0, ["a.0", "a.1"], detailed=False, images=True)
    for number in range(1, 1001):
        log.write(log_step(number))
    log.close()
    steps = sorted(set(drawn))  # one image of all tasks together, one of each
    assert steps[:3] == [1, 2, 3] and steps[-1] > 900
    assert len(steps) < 70, f"{len(steps)} in 1000 steps"
    half = sum(step <= 500 for step in steps)
    assert len(steps) - half <= 8, "in the second half as many as one for each tenth more steps"


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tmp_path, 0, [], detailed=False, images=False)
    log.write(log_step(1, loss=math.nan, grad_norm=math.inf))
    log.close()
    row = json.loads((tmp_path / "routing.jsonl").read_text())
    assert row["losses"]["task"] is None and row["router_grad_norm"] is None
    assert math.isnan(read_log(tmp_path / "routing.jsonl")[0].losses["task"])


def test_a_last_line_cut_by_a_kill_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / "routing.jsonl"
    path.write_text(path.read_text()[:-40])
    assert [step.step for step in read_log(path)] == [1]
    write(tmp_path, 3, start=2)
    assert [step.step for step in read_log(path)] == [1, 3]


def test_a_new_run_starts_over_and_a_resumed_one_keeps_what_was_done(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    write(tmp_path, 3, 4, start=2)
    assert [step.step for step in read_log(tmp_path / "routing.jsonl")] == [1, 2, 3, 4]
    write(tmp_path, 1)
    assert [step.step for step in read_log(tmp_path / "routing.jsonl")] == [1]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*routing.jsonl: train with moa.RoutingMonitor"):
        read_log(tmp_path / "routing.jsonl")
    path = tmp_path / "routing.jsonl"
    for text in ("not json\n", '{"step": 1}\n', "[]\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="line 1 is not a log step"):
            read_log(path)


def test_tensorboard_opens_on_the_means() -> None:
    """It shows groups, the part before the first slash, and the tags in each in the order of their names."""
    tags = log_step(1).scalars(detailed=True)
    tags |= {"train/loss": 0.0, "eval/loss": 0.0}
    order = sorted(tags, key=lambda tag: (tag.split("/")[0], tag))
    assert [tag.split("/")[0] for tag in order][:1] == ["eval"]  # Trainer's own, in a run beside ours
    assert next(tag for tag in order if tag.startswith("moa")).startswith("moa/mean/")
