"""The spectra of a model's experts, against numpy's singular values and scipy's angles; and their place in the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moa
from moa.errors import ShapeError
from moa.monitor.expert_spectra import LayerSpectra, expert_spectra
from moa.monitor.figures import profile_figure, rank_figure
from moa.monitor.report import report
from moa.monitor.spectra_section import spectra_section
from tests.monitor.test_report import Page, run


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (B, 6) of x (B, 12)."""
        return self.second(self.first(x))


def made(router: str = "fixed", **keywords: object) -> moa.MoAModel:
    """Return a model whose experts are all drawn, those at zero, too."""
    torch.manual_seed(0)
    model = moa.build(Two(), router, n_experts=3, targets=["first", "second"], **keywords)
    with torch.no_grad():
        for _, branch in model.branches():
            for parameter in branch.bank.parameters():
                parameter.normal_()
    return model


def effective(matrix: np.ndarray) -> float:
    p = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = p[p > 1e-12 * p.sum()] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def over_cuts(matrix: np.ndarray) -> dict[int, float]:
    """Return the entropy of a (20, 12) change at the cuts of 5 · 2 · 2 · 3 · 2 · 2."""
    cuts = (5, 10, 20, 60, 120)
    return {cut: float(np.log(effective(matrix.reshape(cut, -1)))) for cut in cuts}


def test_ranks_overlaps_and_the_mixed_change_are_those_of_numpy_and_scipy() -> None:
    angles = pytest.importorskip("scipy.linalg").subspace_angles
    loads = {"first": torch.tensor([0.7, 0.3, 0.0])}
    for model, weights, routing in (
        (made(rank=3), torch.ones(3), "constant"),
        (made("topk", rank=3, k=2), loads["first"], "load"),
    ):
        found = expert_spectra(model, loads)["first"]
        bank = next(branch.bank for name, branch in model.branches() if name == "first")
        dense = [bank.delta(e).dense().double().numpy() for e in range(3)]
        assert found.ranks == pytest.approx([effective(m) for m in dense], rel=1e-5)
        assert np.exp(found.entropies) == pytest.approx(found.ranks)
        spaces = [np.linalg.svd(m) for m in dense]
        pairs = [(a, b) for a in range(3) for b in range(a)]
        outputs = [np.mean(np.cos(angles(spaces[a][0][:, :3], spaces[b][0][:, :3])) ** 2) for a, b in pairs]
        inputs = [np.mean(np.cos(angles(spaces[a][2][:3].T, spaces[b][2][:3].T)) ** 2) for a, b in pairs]
        assert found.outputs == pytest.approx(outputs, rel=1e-4)
        assert found.inputs == pytest.approx(inputs, rel=1e-4)
        mixed = sum(float(w) * m for w, m in zip(weights, dense, strict=True))
        assert found.mixed == pytest.approx(effective(mixed), rel=1e-5)
        assert found.routing == routing
        assert found.shape == (20, 12)
        profiles = [over_cuts(m) for m in dense]
        assert found.profile == pytest.approx({cut: np.mean([own[cut] for own in profiles]) for cut in profiles[0]})
        assert found.mixed_profile == pytest.approx(over_cuts(mixed), rel=1e-5)


def test_what_is_not_known_or_not_a_weight_change_says_so() -> None:
    assert expert_spectra(made("topk", rank=2, k=1))["first"].mixed is None
    found = expert_spectra(made(rank=2, expert="bottleneck"))
    assert all("not a weight change" in own.why_not and not own.ranks for own in found.values())
    page = spectra_section(found)
    assert "second: " in page and "not a weight change" in page and "<table>" not in page


def test_an_expert_that_changes_nothing_has_no_rank_and_no_pairs() -> None:
    fresh = moa.build(Two(), "fixed", n_experts=3, rank=2, targets=["first", "second"])
    found = expert_spectra(fresh)["second"]
    assert list(found.ranks) == [0.0, 0.0, 0.0] and not found.outputs and found.mixed == 0
    assert not found.profile and set(found.mixed_profile.values()) == {0.0}


def test_changes_that_are_not_of_low_rank_have_a_profile_while_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(rank=3, expert="randlora")
    assert expert_spectra(model)["first"].profile
    monkeypatch.setattr("moa.monitor.expert_spectra.LARGEST", 239)
    monkeypatch.setattr("moa.monitor.spectra_section.LARGEST", 239)
    found = expert_spectra(model)
    assert not found["first"].profile and found["second"].profile
    assert "first: not of low rank, and of more than 239 entries" in spectra_section(found)


def test_the_page_has_a_folded_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path, tasks=False)
    model = made(rank=3)
    monkeypatch.setattr("moa.monitor.report.load", lambda path: model if path == folder / "model" else None)
    without = report(folder).read_text()
    page = Page(text := report(folder, spectra=True).read_text())
    found = expert_spectra(model)["second"]
    assert "Spectra of the experts" in page.text and "Spectra" not in without
    assert len(page.sources) == len(Page(without).sources) + 2
    assert f"{max(found.outputs):.3f}" in text and f"{found.mixed:.2f} (constant)" in text


def test_the_figure_has_the_ranks_in_its_cells() -> None:
    figure = rank_figure({"a": [1.0, 2.0], "b": [3.0]})
    cells = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(cells.filled(-1), [[1, 2], [3, -1]])


def test_a_figure_of_profiles_has_a_panel_for_each_shape_and_the_mean_of_its_layers() -> None:
    layers = {"a": (2, 4), "b": (2, 4), "c": (3, 3)}
    one = {"a": {2: 0.5, 4: 0.25}, "b": {2: 0.1, 4: 0.75}, "c": {3: 0.3}}
    axes = profile_figure(layers, {"one": one | {"c": {3: 2.5}}, "two": {"a": {2: 1.0, 4: 2.0}, "b": {}, "c": {}}}).axes
    assert [panel.get_title() for panel in axes] == ["2 × 4", "3 × 3"]
    thick = [line for line in axes[0].lines if line.get_linewidth() == 2]
    assert [list(line.get_ydata()) for line in thick] == [pytest.approx([0.3, 0.5]), [1.0, 2.0]]
    assert all(panel.get_ylim()[0] == 0 and panel.get_ylim()[1] > 2.5 for panel in axes), "all of it is seen"
    with pytest.raises(ShapeError, match="at least one curve"):
        profile_figure(layers, {"one": {"a": {}}})


def test_names_of_a_page_are_text() -> None:
    assert "<b>" not in spectra_section({"<b>": LayerSpectra([1.0], [0.0])})
