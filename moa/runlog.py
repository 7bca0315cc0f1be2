"""The files of a monitored run: `routing.jsonl`, one line per log step, and TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .monitor import LayerLoad

FILE = "routing.jsonl"


@dataclass(frozen=True)
class LogStep:
    """One line of `routing.jsonl`.

    Args:
        step: optimizer steps done.
        layers: layer -> what it did since the line before.
        by_task: task name -> layer -> (E,) load.
        losses: name -> mean over the window.
        router_grad_norm: mean over the window; None where no gradient was seen.
        warnings: in words.
    """

    step: int
    layers: dict[str, LayerLoad]
    by_task: dict[str, dict[str, Tensor]]
    losses: dict[str, float]
    router_grad_norm: float | None
    warnings: list[str]


def json_line(
    step: int,
    layers: Mapping[str, LayerLoad],
    by_task: Mapping[str, Mapping[str, Tensor]],
    losses: Mapping[str, float],
    router_grad_norm: float | None,
    warnings: Sequence[str],
) -> str:
    """Return the line of one log step; loads (E,) are lists, numbers that are not finite are null.

    Args:
        step: see `LogStep`, as the others.
    """
    row = {
        "step": step,
        "layers": {
            name: {
                "load": layer.load.tolist(),
                "rows": layer.rows,
                "k": layer.k,
                "dead_share": layer.dead_share,
                **layer.measures(),
            }
            for name, layer in layers.items()
        },
        "by_task": {task: {name: load.tolist() for name, load in loads.items()} for task, loads in by_task.items()},
        "losses": {name: value if math.isfinite(value) else None for name, value in losses.items()},
        "router_grad_norm": router_grad_norm if router_grad_norm is None or math.isfinite(router_grad_norm) else None,
        "warnings": list(warnings),
    }
    return json.dumps(row, allow_nan=False)


def read_log(path: str | Path) -> list[LogStep]:
    """Return the log steps in a `routing.jsonl`; a last line that a kill cut short is left out.

    Raises:
        ConfigError: no such file, or a line that is not a log step; its number is named.
    """
    return [step for _, step in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[str, LogStep]]:
    if not path.is_file():
        raise ConfigError(f"there is no {path}: train with moa.RoutingMonitor, which writes it.")
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            yield line, _log_step(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} line {number} is not a log step ({type(error).__name__}: {error}): was the file edited?"
            ) from error


def _log_step(row: dict[str, Any]) -> LogStep:
    return LogStep(
        step=int(row["step"]),
        layers={
            name: LayerLoad(_tensor(v["load"]), v["rows"], v["k"], dead_share=v["dead_share"])
            for name, v in row["layers"].items()
        },
        by_task={t: {name: _tensor(v) for name, v in loads.items()} for t, loads in row["by_task"].items()},
        losses={name: math.nan if v is None else float(v) for name, v in row["losses"].items()},
        router_grad_norm=row["router_grad_norm"],
        warnings=list(row["warnings"]),
    )


def _tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class RunLog:
    """Writes both files.

    Args:
        folder: of `routing.jsonl`, made if it does not exist.
        events: folder of the TensorBoard events.
        start_step: optimizer steps done; what either file holds of later ones is dropped.
        layout: TensorBoard's custom-scalars layout.
    """

    def __init__(self, folder: Path, events: Path, start_step: int, layout: Mapping[str, Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        kept = [line for line, step in _lines(path) if step.step <= start_step] if start_step and path.exists() else []
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)
        self._file = path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(events), purge_step=start_step + 1 if start_step else None)
        self._writer.add_custom_scalars(layout)

    def line(self, line: str) -> None:
        """Append one line and hand it to the system, so that a kill loses no earlier one."""
        self._file.write(line + "\n")
        self._file.flush()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text."""
        self._writer.add_text(tag, text, step)

    def image(self, tag: str, pixels: Any, step: int) -> None:
        """Write an image (height, width, 3) uint8."""
        self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Hand the events to the system."""
        self._writer.flush()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._writer.close()
