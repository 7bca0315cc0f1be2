"""Candidates for the package's launches, without a GPU: right in the interpreter, compiled as they are called.

Run: pytest tests/kernels/test_candidates.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from experiments.gpu import contests, variants, warm
from experiments.gpu.compiled import SHARED_LIMIT, Report, compile_only, distinct, report
from experiments.gpu.contests import Contest
from experiments.gpu.pretended import Rehearsal

from .test_triton import assert_passes_interpreted


def test_every_candidate_equals_the_truth_in_the_interpreter():
    assert_passes_interpreted("tests/kernels/interpreted_candidates.py")


@pytest.mark.parametrize("name", ["shrink, warps apart", "dy read once", "base and expand"])
def test_candidates_compile_as_they_are_called(name):
    """The last of each contest, for a Hopper GPU at the size of the table; the rehearsal compiles them all."""
    contest = variants.ALL[name](variants.Nowhere())
    with compile_only(90) as launched:
        list(contest.after.values())[-1]()
    for label, kernel in distinct(launched):
        said = report(label, kernel)
        assert variants.flaw(f"contest {name}", said) is None and said.shared <= SHARED_LIMIT[90], said


def test_flaws_are_seen():
    name = "contest shrink, warps apart"
    well = Report("bulk_shrink_kernel", 168, 0, 0, 1 << 16, frozenset(), frozenset({"UTMALDG.2D"}), True)
    assert variants.flaw(name, well) is None
    assert variants.flaw("contest shrink", replace(well, apart=False)) is None
    assert variants.flaw(name, replace(well, spills=1)) == "it spills"
    assert variants.flaw(name, replace(well, copies=frozenset({"LDGSTS.E"}))) == "the copy engine brings nothing"
    assert variants.flaw(name, replace(well, apart=False)) == "its warps are not set apart"
    assert variants.flaw("contest shrink", well) == "its warps are set apart"


def test_a_rehearsal_fails_for_a_flaw(monkeypatch):
    said = Report("split_shrink_kernel", 255, 8, 2, 1 << 16, frozenset(), frozenset(), False)
    monkeypatch.setattr("experiments.gpu.compiled.report", lambda name, kernel: said)
    with pytest.raises(RuntimeError, match=r"split_shrink_kernel of .*contest shrink.*it spills"):
        warm.remarks(warm.Job("contest shrink"), said.name, None, 90)
    assert "spills" in warm.remarks(warm.Job("triton_concat"), said.name, None, 90)[0]
    said = replace(said, stack=0, spills=0, copies=frozenset({"LDGSTS.E"}))
    (line,) = warm.remarks(warm.Job("contest shrink"), said.name, None, 90)
    assert line == "contest shrink: split_shrink_kernel: 255 registers, 65536 shared, LDGSTS.E"


def test_every_contest_is_compiled_before_it_is_measured():
    assert {f"contest {name}" for name in variants.ALL} <= {job.what for job in warm.jobs()}


def contest(**after):
    value = torch.ones(100)
    return Contest(("y",), lambda dtype: [value.to(dtype)], lambda: [value.half()], after)


def test_only_what_is_right_is_timed():
    turns = []

    def moves():
        turns.append(0)
        return [torch.ones(100).half() - 2**-11 * (len(turns) % 2)]  # the next number

    def refuses():
        raise ValueError("not here")

    found = variants.compete(
        Rehearsal(),
        lambda machine: contest(
            right=lambda: [torch.ones(100).half()],
            wrong=lambda: [torch.ones(100).half() * 1.5],
            unwritten=lambda: [torch.empty(100).half()],
            moves=moves,
            refuses=refuses,
        ),
    )
    assert found["holds"] is False
    assert set(found["times"]) == {"before", "right", "before, again"} and set(found["ratios"]) == {"right"}
    said = dict(line.split(": ", 1) for line in found["notes"])
    assert said["wrong"].startswith("not timed, y is wrong by 0.5")
    assert said["unwritten"].startswith("not timed, y is wrong by inf")
    assert said["moves"] == "not timed, it gives other bits the second time"
    assert said["refuses"] == "not timed, ValueError: not here"
    assert "before" in said["right"] and "ratio" in said["right"]


def test_a_lost_device_is_not_one_candidate_of_many():
    def loses():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        variants.compete(Rehearsal(), lambda machine: contest(loses=loses))


@pytest.mark.parametrize(("ratio", "spread", "word"), [
    (1.031, 0.0, "**keep** (keep from 1.030)"),
    (1.04, 0.02, "**leave** (keep from 1.050)"),
    (0.9, 0.0, "**leave**"),
    (None, 0.0, "not measured"),
])  # fmt: skip
def test_a_candidate_is_kept_beyond_the_spread(ratio, spread, word):
    assert word in variants.verdict("one", 0.05, ratio, spread)
    if ratio == 1.031:
        assert variants.verdict("one", 0.05, ratio, spread).startswith(
            "one: before 50.0 µs, after 48.5 µs, ratio 1.031"
        )


def test_the_first_that_hangs_ends_those_with_warps_apart():
    def names(found):
        return [row.name for row in variants.rows(Rehearsal(), lambda: found)]

    assert names({}) == list(variants.ALL)
    assert names({"unmix, warps apart": {"error": "it ran for more than 20 s"}}) == list(contests.CONTESTS)
    assert names({"unmix, warps apart": {"error": "ValueError: no"}}) == list(variants.ALL)
    assert [row.limit for row in variants.rows(Rehearsal(), dict)][-3:] == [20.0] * 3
