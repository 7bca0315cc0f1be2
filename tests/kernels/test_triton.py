"""Triton kernels without a GPU: interpreted against the truth, and compiled for four architectures as launched.

Run: pytest tests/kernels/test_triton.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa.kernels.triton import launches, thin
from moa.kernels.triton import triton_concat as concat
from moa.kernels.triton import triton_grouped as grouped

from .aot import ARCHITECTURES, SHARED_LIMIT, Report, reports, routed_reports

ROOT = Path(__file__).parents[2]
MATRIX_OP = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def assert_passes_interpreted(*arguments: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("part", ["triton_concat", "not triton_concat"])
def test_every_kernel_equals_the_truth_in_the_interpreter(part):
    assert_passes_interpreted("tests/kernels/interpreted.py", "-k", part)


def test_tiles_can_be_measured():
    assert_passes_interpreted("tests/kernels/tuned.py")


def check(found: list[Report], arch: int, names: set[str], matrix_op: str | None = None) -> None:
    """Fail unless exactly these kernels were launched, none spills, all fit, and products use the matrix units."""
    assert {report.name for report in found} == names
    for report in found:
        assert report.stack == 0 and report.spills == 0, report
        assert report.shared <= SHARED_LIMIT[arch], report
        if report.name not in ("add_splits_kernel", "add_chunks_kernel", "combine_kernel") and matrix_op:
            assert any(op.startswith(matrix_op) for op in report.matrix_ops), report


FORWARD = {"shrink_kernel", "expand_kernel"}
TRAINING = {*FORWARD, "unmix_kernel", "gram_kernel", "add_splits_kernel"}
DECODE = {"partial_shrink_kernel", "gated_expand_kernel"}
GROUPED_FORWARD = {"grouped_shrink_kernel", "grouped_expand_kernel", "combine_kernel"}
GROUPED = {*GROUPED_FORWARD, "grouped_gram_kernel", "add_chunks_kernel"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_kernels_fit_without_spills(arch, monkeypatch):
    """8 experts of rank 8, k = 2, the usual layer."""
    found = reports(concat, arch, monkeypatch)
    check(found, arch, TRAINING, MATRIX_OP[arch])
    assert all(report.registers <= 200 for report in found), found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_shrink_with_its_router_fits_without_spills(arch, monkeypatch):
    found = routed_reports(arch, monkeypatch)
    check(found, arch, {"routed_shrink_kernel", "expand_kernel"}, MATRIX_OP[arch])
    assert all(report.registers <= 200 for report in found), found


def test_a_larger_shrink_with_its_router_fits_the_smallest_shared_memory(monkeypatch):
    found = routed_reports(120, monkeypatch, n_experts=16, rank=16)
    check(found, 120, {"routed_shrink_kernel", "expand_kernel"}, "HMMA")


def test_a_dense_layer_fits_without_spills(monkeypatch):
    check(reports(concat, 90, monkeypatch, rank=16, k=None), 90, TRAINING, "HGMMA")


def test_a_larger_layer_fits_the_smallest_shared_memory(monkeypatch):
    found = reports(concat, 120, monkeypatch, n_experts=16, rank=16, with_bias=True, with_backward=False)
    check(found, 120, FORWARD, "HMMA")


@pytest.mark.parametrize("arch", [90, 120])
def test_decode_kernels_fit_without_spills(arch, monkeypatch):
    sizes = {"n_rows": 1, "d_in": 256} if arch == 90 else {"n_rows": 64, "n_experts": 16, "rank": 16}
    check(reports(concat, arch, monkeypatch, with_backward=False, **sizes), arch, DECODE, "HMMA")


def test_grouped_kernels_fit_without_spills(monkeypatch):
    check(reports(grouped, 90, monkeypatch, n_experts=64, rank=16), 90, GROUPED, "H")


def test_odd_sizes_and_a_single_slot_compile(monkeypatch):
    """The JIT turns strides of 1 into constants, and loads that are not aligned into narrow ones, which may spill."""
    odd = {"n_rows": 333, "d_in": 523, "d_out": 111, "n_experts": 5, "rank": 3, "k": 1, "with_backward": False}
    assert {report.name for report in reports(concat, 90, monkeypatch, **odd)} == FORWARD
    assert {report.name for report in reports(grouped, 90, monkeypatch, **odd)} == GROUPED_FORWARD


def test_fp32_rows_are_multiplied_exactly(monkeypatch):
    found = reports(concat, 90, monkeypatch, dtype=torch.float32, with_backward=False)
    check(found, 90, FORWARD)
    assert not any(report.matrix_ops for report in found)


def test_another_number_of_rows_compiles_nothing(monkeypatch):
    """Row counts are not specialised: the same kernels serve 4097 and 8192 rows."""
    one, other = (reports(concat, 90, monkeypatch, n_rows=n, with_backward=False) for n in (4097, 8192))
    assert one == other


def test_the_report_sees_spills(monkeypatch):
    """Twice the columns in one tile is what the launchers avoid: it must not pass."""
    monkeypatch.setattr(launches, "shrink_sizes", lambda *_: thin.Sizes(64, 128, 64, 4, 3))
    found = reports(concat, 80, monkeypatch, n_experts=16, rank=16, with_backward=False)
    with pytest.raises(AssertionError, match="shrink_kernel"):
        check(found, 80, FORWARD)
