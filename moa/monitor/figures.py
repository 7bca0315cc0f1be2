"""Figures: the layer × expert heat map that TensorBoard, the report and the demo share, and reliability."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ShapeError, shown

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

Loads = Mapping[str, Tensor] | Tensor

COLORMAP = "viridis"  # sequential, even in lightness, readable to colour-blind eyes
MAX_LABELS = 64
PANELS_PER_ROW = 8


def short_names(names: Sequence[str]) -> list[str]:
    """Return layer names without the dotted beginning that all of them share."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts] if len(parts) > 1 else list(names)


class RoutingHeatmap:
    """A heat map with one panel per task that can be redrawn cheaply: only the coloured cells change.

    Args:
        names: layers, top to bottom.
        n_experts: E, columns; layers with fewer experts leave cells grey.
        panels: titles, left to right.
        title: above all panels.
        dpi: pixels per inch of `image`.
    """

    def __init__(
        self, names: Sequence[str], n_experts: int, panels: Sequence[str] = ("",), title: str = "", dpi: int = 80
    ) -> None:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        self.names, self.n_experts, self.panels = list(names), n_experts, list(panels)
        columns = min(len(self.panels), PANELS_PER_ROW)
        rows = math.ceil(len(self.panels) / columns)
        labels = [shown(name, 60) for name in short_names(self.names)]
        every = math.ceil(len(labels) / MAX_LABELS)
        # margins in inches, set by hand: matplotlib's own layout takes seconds with many panels
        left, right, bottom = 0.2 + 0.072 * max(len(label) for label in labels), 1.1, 0.5
        top = 0.15 + 0.25 * bool(title) + 0.2 * any(self.panels)
        panel_width = min(max(1.4, 0.18 * n_experts), 5.0)
        panel_height = max(0.15 * min(len(labels), MAX_LABELS), 1.5)
        width = left + columns * panel_width * 1.08 + right
        height = top + rows * (panel_height + 0.3) + bottom
        self.figure: Figure = Figure(figsize=(width, height), dpi=dpi)
        FigureCanvasAgg(self.figure)
        box = {"left": left / width, "right": 1 - right / width, "top": 1 - top / height, "bottom": bottom / height}
        space = {"wspace": 0.08, "hspace": 0.3 / panel_height}
        grid = self.figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True, gridspec_kw=box | space)
        cmap = colormaps[COLORMAP].with_extremes(bad="0.85")
        most = min(4, max(2, n_experts))
        self._images: list[Any] = []
        for place, axes in enumerate(grid.flat):
            if place >= len(self.panels):
                axes.set_visible(False)
                continue
            blank = torch.full((len(self.names), n_experts), math.nan).numpy()
            image = axes.imshow(blank, aspect="auto", cmap=cmap, vmin=0, vmax=most, interpolation="nearest")
            self._images.append(image)
            axes.set_title(shown(self.panels[place], 24), fontsize=8, parse_math=False)  # a name is text, not markup
            axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=7, parse_math=False)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.tick_params(axis="x", labelsize=7)
            axes.tick_params(length=2)
        self.figure.supxlabel("expert", fontsize=8, x=(box["left"] + box["right"]) / 2, y=0.12 / height)
        place_of_bar = self.figure.add_axes((1 - 0.95 / width, box["bottom"], 0.14 / width, box["top"] - box["bottom"]))
        bar = self.figure.colorbar(self._images[0], cax=place_of_bar, extend="max", extendfrac=0.03)
        bar.set_label("load relative to the even share 1/E", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.set_ticks(range(most + 1), labels=["0", "1 (even)", *(str(t) for t in range(2, most + 1))])
        bar.ax.axhline(1, color="white", linewidth=1.5)
        if title:
            self.figure.suptitle(shown(title), fontsize=9, y=1 - 0.1 / height, va="top", parse_math=False)
        self._background: Any = None

    def show(self, panels: Sequence[Mapping[str, Tensor]]) -> None:
        """Colour the cells.

        Args:
            panels: for each panel, layer -> (E,) load; a layer that is absent is grey.
        """
        for image, loads in zip(self._images, panels, strict=True):
            cells = torch.full((len(self.names), self.n_experts), math.nan)
            for row, name in enumerate(self.names):
                if name in loads:
                    load = loads[name]
                    cells[row, : load.shape[-1]] = load.float() * load.shape[-1]
            image.set_data(cells.numpy())

    def image(self, panels: Sequence[Mapping[str, Tensor]]) -> np.ndarray[Any, Any]:
        """Return the figure as pixels (height, width, 3) uint8; labels are drawn the first time only."""
        import numpy as np

        canvas: Any = self.figure.canvas
        if self._background is None:
            for image in self._images:
                image.set_animated(True)
            canvas.draw()
            self._background = canvas.copy_from_bbox(self.figure.bbox)
        self.show(panels)
        canvas.restore_region(self._background)
        for image in self._images:
            image.axes.draw_artist(image)
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def routing_figure(load: Loads, *, per_task: Mapping[str, Loads] | None = None, title: str = "") -> Figure:
    """Return a heat map layer × expert of the load relative to the even share, with one panel per task.

    Args:
        load: layer -> (E,) load, or one tensor (L, E).
        per_task: task -> its loads, as `load`.
        title: above the panels.

    Raises:
        ShapeError: a tensor is not (L, E), or there is no layer.
    """
    panels = {"all": _by_name(load), **{task: _by_name(value) for task, value in (per_task or {}).items()}}
    names = list(panels["all"])
    if not names:
        raise ShapeError("a routing figure needs at least one layer, and load has none.")
    n_experts = max(value.shape[-1] for value in panels["all"].values())
    heatmap = RoutingHeatmap(names, n_experts, list(panels) if per_task else [""], title, dpi=100)
    heatmap.show(list(panels.values()))
    return heatmap.figure


def rank_figure(ranks: Mapping[str, Sequence[float]]) -> Figure:
    """Return a heat map layer × expert of effective ranks.

    Args:
        ranks: layer -> one of each expert.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    labels = [shown(name, 60) for name in short_names(list(ranks))]
    n_experts = max(map(len, ranks.values()))
    cells = torch.full((len(ranks), n_experts), math.nan)
    for row, own in enumerate(ranks.values()):
        cells[row, : len(own)] = torch.tensor(own)
    every = math.ceil(len(labels) / MAX_LABELS)
    height = 0.9 + max(0.15 * min(len(labels), MAX_LABELS), 1.0)
    width = 1.6 + 0.072 * max(map(len, labels)) + min(max(1.4, 0.25 * n_experts), 6.0)
    figure: Figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(cells.numpy(), aspect="auto", cmap=COLORMAP, vmin=0, interpolation="nearest")
    axes.set_yticks(range(0, len(labels), every), labels[::every], fontsize=7, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_xlabel("expert", fontsize=8)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("effective rank", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def profile_figure(
    layers: Mapping[str, tuple[int, int]], curves: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> Figure:
    """Return the entropies over cuts of many layers, one panel for each shape of layer; the row-column cut is marked.

    Args:
        layers: name -> (o, i).
        curves: what is drawn -> layer -> cut -> entropy in nats; each layer's thin, their mean thick.

    Raises:
        ShapeError: there is no curve.
    """
    shapes = sorted({layers[name] for own in curves.values() for name, cuts in own.items() if cuts})
    if not shapes:
        raise ShapeError("a figure of profiles needs at least one curve, and curves has none.")
    figure, grid = _panels(len(shapes), 3.2, 2.5, sharey=True)
    for axes, (o, i) in zip(grid.flat, shapes, strict=False):
        for colour, (what, own) in zip(("#31688e", "#d1495b"), curves.items(), strict=False):
            drawn = [cuts for name, cuts in own.items() if cuts and layers[name] == (o, i)]
            if not drawn:
                continue
            places = list(drawn[0])
            for cuts in drawn:
                axes.plot(places, list(cuts.values()), color=colour, linewidth=0.5, alpha=0.4)
            mean = [sum(cuts[place] for cuts in drawn) / len(drawn) for place in places]
            axes.plot(places, mean, color=colour, linewidth=2, marker=".", label=what)
        axes.axvline(o, color="0.5", linewidth=1, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_title(f"{o} × {i}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    grid[0, 0].set_ylim(bottom=0)  # of all panels, once all is drawn
    figure.supxlabel("size of the part before the cut; dotted: between rows and columns", fontsize=8)
    figure.supylabel("entropy (nats)", fontsize=8)
    return figure


def reliability_figure(tasks: Mapping[str, Mapping[str, Sequence[float]]], title: str = "") -> Figure:
    """Return how often predictions come true against how sure the model was: one panel a task; on the line is perfect.

    Args:
        tasks: task -> "counts", "confidence" and "accuracy" of its bins (N,) each.
        title: above the panels.

    Raises:
        ShapeError: there is no task.
    """
    if not tasks:
        raise ShapeError("a reliability figure needs at least one task, and tasks has none.")
    figure, grid = _panels(len(tasks), 2.9, 3.1, sharex=True, sharey=True)
    for axes, (task, bins) in zip(grid.flat, tasks.items(), strict=False):
        confidence, accuracy = bins["confidence"], bins["accuracy"]
        share = [count / sum(bins["counts"]) for count in bins["counts"]]
        axes.bar(confidence, share, width=0.04, color="0.8", label="share of rows")
        axes.plot([0, 1], [0, 1], color="0.4", linewidth=1, linestyle=":")
        axes.vlines(confidence, confidence, accuracy, color="#d1495b", linewidth=1.5, label="gap")
        axes.plot(confidence, accuracy, color="#31688e", marker="o", markersize=4, label="accuracy")
        axes.set_title(shown(task, 40), fontsize=9, parse_math=False)
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
        axes.tick_params(labelsize=7)
    grid[0, 0].legend(fontsize=7, loc="upper left")
    figure.supxlabel("confidence, mean of a bin", fontsize=8)
    figure.supylabel("accuracy", fontsize=8)
    if title:
        figure.suptitle(shown(title), fontsize=9, parse_math=False)
    return figure


def _panels(n: int, width: float, height: float, **shared: Any) -> tuple[Figure, Any]:
    """Return a figure of n panels of a size in inches, and their grid (rows, columns), whose rest is not shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(n, PANELS_PER_ROW // 2)
    rows = math.ceil(n / columns)
    figure: Figure = Figure(figsize=(0.6 + width * columns, 0.6 + height * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in list(grid.flat)[n:]:
        axes.set_visible(False)
    return figure, grid


def _by_name(load: Loads) -> Mapping[str, Tensor]:
    if not isinstance(load, Tensor):
        return load
    if load.ndim != 2:
        raise ShapeError(f"load must be (L, E) or a mapping layer -> (E,), got shape {tuple(load.shape)}.")
    return {f"layer {row}": values for row, values in enumerate(load)}
