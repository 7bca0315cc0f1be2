"""Tile sizes that are measured, in Triton's interpreter. Not collected by itself: see `test_triton.py`."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from triton.runtime.errors import OutOfResources

from moa.kernels import low_rank_mixture
from moa.kernels.triton import tiles
from moa.kernels.triton.thin import Sizes

from .compare import make_case, results

FIXED = Sizes(32, 64, 64, 4, 3)
# The interpreter of triton before 3.9 takes scalars from arrays in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """Tune into an empty folder, with a clock that likes many stages."""
    monkeypatch.setenv("MOA_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "_known", {})
    monkeypatch.setattr(tiles, "_read", set())
    monkeypatch.setattr(tiles, "TUNE", True)
    return tmp_path


def test_candidates_keep_the_blocks_of_sums():
    tried = tiles.candidates(FIXED)
    assert tried[0] == FIXED and len(set(tried)) == len(tried) == 18
    assert {(s.block_c, s.block_d) for s in tried} == {(FIXED.block_c, FIXED.block_d)}


def test_the_fastest_that_fits_is_taken():
    times = {Sizes(16, 1, 1, 4, 3): 3.0, Sizes(32, 1, 1, 4, 3): 1.0, Sizes(64, 1, 1, 4, 3): 2.0}
    seen = []

    def timer(step):
        step()
        if seen[-1].block_t == 32:
            raise OutOfResources(300, 227, "shared memory")
        return times[seen[-1]]

    assert tiles.fastest(list(times), seen.append, timer).block_t == 64
    with pytest.raises(OutOfResources):
        tiles.fastest([Sizes(32, 1, 1, 4, 3)], seen.append, timer)


def test_it_is_measured_once_and_kept_in_a_file(monkeypatch, fresh):
    measured, ran = [], []

    def timer(step):
        step()
        measured.append(ran[-1])
        return 0.0 if ran[-1].stages == 4 else 1.0

    monkeypatch.setattr(tiles, "device_time", timer)
    for _ in range(2):
        tiles.launch("shrink", 100, (64, "fp32"), FIXED, ran.append)
    assert len(measured) == 18 and ran[-1].stages == 4
    (file,) = fresh.iterdir()
    assert list(json.loads(file.read_text())) == ["shrink/128/64/fp32"]
    tiles._known.clear(), tiles._read.clear()  # another process
    tiles.launch("shrink", 128, (64, "fp32"), FIXED, ran.append)
    assert len(measured) == 18 and ran[-1].stages == 4
    tiles.launch("shrink", 129, (64, "fp32"), FIXED, ran.append)
    assert len(measured) == 36


def test_nothing_is_measured_unless_asked_for(monkeypatch, fresh):
    monkeypatch.setattr(tiles, "TUNE", False)
    ran = []
    tiles.launch("shrink", 100, (64,), FIXED, ran.append)
    assert ran == [FIXED] and not list(fresh.iterdir())


def test_a_foreign_file_is_named(fresh):
    file = tiles.tiles_file()
    file.write_text("[1]")
    with pytest.raises(ValueError, match="delete it"):
        tiles.launch("shrink", 100, (64,), FIXED, lambda size: None)


def test_tuned_launches_give_the_same_values(monkeypatch):
    case = make_case((70,), d_in=64, d_out=48, n_experts=8, rank=4).to(torch.float32)
    run = partial(low_rank_mixture, engine="triton_concat")
    monkeypatch.setattr(tiles, "TUNE", False)
    fixed = results(run, case)
    monkeypatch.setattr(tiles, "TUNE", True)
    monkeypatch.setattr(tiles, "candidates", lambda size: [Sizes(16, size.block_c, size.block_d, 8, 2)])
    monkeypatch.setattr(tiles, "device_time", lambda step: step() or 1.0)
    for one, other in zip(results(run, case), fixed, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-6)
    assert {key.split("/")[0] for key in tiles._known} == {"shrink", "unmix", "expand"}
