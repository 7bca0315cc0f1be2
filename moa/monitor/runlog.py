"""What a monitored run leaves behind: `routing.jsonl`, one line per log step, and TensorBoard events."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from .figures import RoutingHeatmap
from .statistics import LayerLoad

FILE = "routing.jsonl"
IMAGES_APART = 1.1  # from one heat map to the next the step grows by this factor: they are most of an event file
SCALARS = ("load_entropy", "effective_experts", "effective_fraction", "dead_fraction", "largest_share")


@dataclass(frozen=True)
class LogStep:
    """What one log step says; a line of `routing.jsonl`.

    Args:
        step: optimizer steps done.
        layers: layer -> what it did since the log step before.
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

    def to_json(self) -> str:
        """Return the line: loads (E,) are lists, numbers that are not finite are null."""
        row = {
            "step": self.step,
            "layers": {
                name: {
                    "load": layer.load.tolist(),
                    "rows": layer.rows,
                    "k": layer.k,
                    "dead_share": layer.dead_share,
                    **layer.measures(),
                }
                for name, layer in self.layers.items()
            },
            "by_task": {
                task: {name: load.tolist() for name, load in loads.items()} for task, loads in self.by_task.items()
            },
            "losses": {name: _finite(value) for name, value in self.losses.items()},
            "router_grad_norm": _finite(self.router_grad_norm),
            "warnings": self.warnings,
        }
        return json.dumps(row, allow_nan=False, separators=(",", ":"))

    def scalars(self, detailed: bool) -> dict[str, float]:
        """Return every TensorBoard scalar by its tag; detailed adds the load (E,) of each layer, expert by expert."""
        measures = {name: layer.measures() for name, layer in self.layers.items()}
        out = {f"moa/objective/{name}": value for name, value in self.losses.items()}
        if self.router_grad_norm is not None:
            out["moa/router_grad_norm"] = self.router_grad_norm
        for what in SCALARS:
            values = [m[what] for m in measures.values()]
            out[f"moa/mean/{what}"] = sum(values) / len(values)
            out[f"moa/worst/{what}"] = max(values) if what in ("dead_fraction", "largest_share") else min(values)
            out.update({f"moa_layers/{what}/{name}": m[what] for name, m in measures.items()})
        if detailed:
            for name, layer in self.layers.items():
                out.update({f"moa_load/{name}/expert_{e}": share for e, share in enumerate(layer.load.tolist())})
        return out


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_log(path: str | Path) -> list[LogStep]:
    """Return the log steps in a `routing.jsonl`; a last line that a kill cut short is left out.

    Raises:
        ConfigError: no such file, or a line that is not a log step; its number is named.
    """
    return [step for _, step in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[str, LogStep]]:
    if not path.is_file():
        raise ConfigError(f"there is no {path}: train with moa.RoutingMonitor, which writes it.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 at byte {error.start}: was the file edited?") from None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            return
        try:
            yield line, _log_step(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"{path} line {number} is not a log step ({type(error).__name__}: {error}): was the file edited?"
            ) from error


def _log_step(row: dict[str, Any]) -> LogStep:
    """Return a line's log step.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: a value that is missing, or of another type or size.
    """
    if not row["layers"]:
        raise ValueError("it has no layers")
    for task, loads in row["by_task"].items():
        for name, load in loads.items():
            if len(load) != len(row["layers"][name]["load"]):
                raise ValueError(f"the loads of {name!r} differ in length between {task!r} and all")
    return LogStep(
        step=int(row["step"]),
        layers={
            name: LayerLoad(
                _tensor(v["load"]), float(v["rows"]), _number_or_none(v["k"]), dead_share=float(v["dead_share"])
            )
            for name, v in row["layers"].items()
        },
        by_task={t: {name: _tensor(v) for name, v in loads.items()} for t, loads in row["by_task"].items()},
        losses={name: math.nan if v is None else float(v) for name, v in row["losses"].items()},
        router_grad_norm=_number_or_none(row["router_grad_norm"]),
        warnings=[str(warning) for warning in row["warnings"]],
    )


def _number_or_none(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"{value!r} is not a number")
    return value


def _tensor(values: list[float]) -> Tensor:
    made = torch.tensor(values, dtype=torch.float64)
    if made.ndim != 1 or not made.numel() or not bool((made.isfinite() & (made >= 0)).all()):
        raise ValueError("a load is a list of shares, each at least 0")
    return made


class RunLog:
    """Writes both.

    Args:
        folder: of `routing.jsonl`, made if it does not exist.
        events: folder of the TensorBoard events.
        start_step: optimizer steps done; what either holds of later ones is dropped.
        names: layers.
        detailed: one scalar per layer and expert.
        images: heat maps, at log steps ever further apart: about 110 in 100,000 steps.
    """

    def __init__(
        self, folder: Path, events: Path, start_step: int, names: list[str], detailed: bool, images: bool
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import custom_scalars

        self.detailed, self.images = detailed, images
        self._heatmaps: dict[tuple[Any, ...], RoutingHeatmap] = {}
        self._next_images = 0
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        kept = [line for line, step in _lines(path) if step.step <= start_step] if start_step and path.exists() else []
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)
        self._path = path
        self._writer = FileWriter(str(events))
        if start_step:  # tells TensorBoard to forget the later steps of the run that was cut off
            self._writer.add_event(Event(step=start_step + 1, file_version="brain.Event:2"))
            start = Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))
            self._writer.add_event(start)
        self._writer.add_summary(custom_scalars(layout(names, detailed)))

    def write(self, step: LogStep) -> None:
        """Write one log step, and hand it to the system so that a kill loses no earlier one."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import text

        with self._path.open("a", encoding="utf-8") as file:
            file.write(step.to_json() + "\n")
        # one event for the whole step: a call per scalar costs more than the rest of the monitor
        summary = Summary()
        for tag, value in step.scalars(self.detailed).items():
            summary.value.add(tag=tag, simple_value=value)
        if step.warnings:
            summary.value.extend(text("moa/warnings", "\n\n".join(step.warnings)).value)
        for tag, panels in self._panels(step).items():
            height, width, png = self._png(step, panels)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
            summary.value.add(tag=tag, image=image)
        self._writer.add_summary(summary, step.step)
        self._writer.flush()

    def _panels(self, step: LogStep) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Return image tag -> panel title -> layer -> (E,) load."""
        if not self.images or step.step < self._next_images:
            return {}
        self._next_images = max(step.step + 1, math.ceil(step.step * IMAGES_APART))
        images = {"moa_load/all": {"": {name: layer.load for name, layer in step.layers.items()}}}
        return {**images, "moa_load/by_task": step.by_task} if step.by_task else images

    def _png(self, step: LogStep, panels: Mapping[str, Mapping[str, Tensor]]) -> tuple[int, int, bytes]:
        """Return height, width and the encoded heat map."""
        from PIL import Image

        n_experts = max(layer.n_experts for layer in step.layers.values())
        key = (tuple(step.layers), n_experts, tuple(panels))
        if key not in self._heatmaps:
            self._heatmaps[key] = RoutingHeatmap(list(step.layers), n_experts, list(panels))
        pixels = self._heatmaps[key].image(list(panels.values()))
        buffer = io.BytesIO()
        # 256 colours and light compression: a third of the bytes, and of the time, of a plain PNG
        reduced = Image.fromarray(pixels).quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        reduced.save(buffer, "PNG", compress_level=3)
        return pixels.shape[0], pixels.shape[1], buffer.getvalue()

    def close(self) -> None:
        """Close the event file; the other is closed after each line."""
        self._writer.close()


def layout(names: list[str], detailed: bool) -> dict[str, dict[str, list[Any]]]:
    """Return TensorBoard's custom-scalars layout: a chart per measure with all layers in it, loads (E,) if detailed."""
    charts: dict[str, list[Any]] = {w.replace("_", " "): ["Multiline", [rf"moa_layers/{w}/.*"]] for w in SCALARS}
    charts["losses"] = ["Multiline", [r"moa/objective/.*"]]
    charts["router gradient norm"] = ["Multiline", [r"moa/router_grad_norm"]]
    out = {"moa: routing": charts}
    if detailed:
        out["moa: load per expert"] = {name: ["Multiline", [rf"moa_load/{name}/expert_.*"]] for name in names}
    return out
