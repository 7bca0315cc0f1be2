"""The heat map: what its cells, labels and colours say. Run: pytest tests/monitor/test_figures.py"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from matplotlib import colormaps

from moa.errors import ShapeError
from moa.monitor.figures import COLORMAP, MAX_LABELS, RoutingHeatmap, reliability_figure, routing_figure, short_names


def test_cells_are_load_relative_to_the_even_share() -> None:
    loads = {"a.0": torch.tensor([0.5, 0.25, 0.25, 0.0]), "a.1": torch.tensor([1.0, 0.0])}
    figure = routing_figure(loads)
    (image,) = figure.axes[0].get_images()
    cells = np.ma.filled(image.get_array(), np.nan)
    np.testing.assert_allclose(cells, [[2, 1, 1, 0], [2, 0, np.nan, np.nan]])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "1"]
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert "load relative to the even share 1/E" in labels
    assert "1 (even)" in [t.get_text() for t in figure.axes[-1].get_yticklabels()]


def test_one_panel_per_task() -> None:
    load = torch.full((3, 4), 0.25)
    figure = routing_figure(load, per_task={"news": load, "films": {"layer 0": load[0]}}, title="step 5")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["all", "news", "films"]
    assert figure.get_suptitle() == "step 5"
    cells = np.ma.filled(figure.axes[2].get_images()[0].get_array(), np.nan)
    assert np.isnan(cells[1:]).all() and (cells[0] == 1).all()


def test_labels_of_deep_models_are_thinned_and_none_overlap() -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(70) for p in ("up", "down", "gate")]
    figure = routing_figure({name: torch.full((8,), 1 / 8) for name in names})
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) <= MAX_LABELS
    figure.canvas.draw()
    boxes = sorted((t.get_window_extent() for t in labels), key=lambda b: b.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    assert min(b.x0 for b in boxes) >= 0


def test_redrawn_image_equals_a_new_one() -> None:
    first = {"a": torch.tensor([0.7, 0.3]), "b": torch.tensor([0.5, 0.5])}
    second = {"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.2, 0.8])}
    reused, fresh = RoutingHeatmap(["a", "b"], 2, ["x", "y"]), RoutingHeatmap(["a", "b"], 2, ["x", "y"])
    before = reused.image([first, second])
    after = reused.image([second, first])
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, fresh.image([second, first]))
    assert after.dtype == np.uint8 and after.shape[2] == 3


def test_pixels_have_the_colour_of_their_cell() -> None:
    pixels = RoutingHeatmap(["a"], 2).image([{"a": torch.tensor([1.0, 0.0])}]).reshape(-1, 3).tolist()
    for value in (0.0, 1.0):
        colour = list(colormaps[COLORMAP](value, bytes=True)[:3])
        assert sum(pixel == colour for pixel in pixels) > 500


def test_short_names() -> None:
    assert short_names(["m.l.0.q", "m.l.0.k", "m.l.1.q"]) == ["0.q", "0.k", "1.q"]
    assert short_names(["m.q", "m.q.b"]) == ["q", "q.b"]
    assert short_names(["m.q"]) == ["m.q"]
    assert short_names([]) == []


def test_bad_shapes() -> None:
    with pytest.raises(ShapeError, match=r"\(L, E\).*got shape \(4,\)"):
        routing_figure(torch.ones(4))
    with pytest.raises(ShapeError, match="at least one layer"):
        routing_figure({})


def test_a_reliability_figure_draws_each_bin_where_it_lies() -> None:
    bins = {"counts": [30, 10], "confidence": [0.4, 0.9], "accuracy": [0.5, 0.6]}
    figure = reliability_figure({"a": bins, "b $x$": bins})
    assert [axes.get_title() for axes in figure.axes] == ["a", "b $x$"]
    line = figure.axes[1].get_lines()[-1]
    np.testing.assert_allclose(line.get_xydata(), [[0.4, 0.5], [0.9, 0.6]])
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.75, 0.25]
    figure.canvas.draw()
    top = figure.axes[0].title.get_window_extent().y1
    assert top <= figure.bbox.y1, "the title is not cut off"
    with pytest.raises(ShapeError, match="at least one task"):
        reliability_figure({})
