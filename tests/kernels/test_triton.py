"""Triton kernels without a GPU: interpreted against the truth, and compiled for four architectures as launched.

Run: pytest tests/kernels/test_triton.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.gpu.compiled import (
    ARCHITECTURES,
    SHARED_LIMIT,
    Report,
    mixture_kernels,
    reports,
    routed_kernels,
    slot_kernels,
)
from experiments.gpu.shapes import Shape
from moa.kernels.triton import launches, thin

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


BF16 = torch.bfloat16
USUAL = Shape(8192, 1024, 512)  # 8 experts of rank 8, k = 2
LARGE = replace(USUAL, n_experts=16, rank=16)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_kernels_fit_without_spills(arch):
    found = reports(mixture_kernels, "triton_concat", arch, USUAL, BF16)
    check(found, arch, TRAINING, MATRIX_OP[arch])
    assert all(report.registers <= 200 for report in found), found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_shrink_with_its_router_fits_without_spills(arch):
    found = reports(routed_kernels, arch, USUAL, BF16)
    check(found, arch, {"routed_shrink_kernel", "expand_kernel"}, MATRIX_OP[arch])
    assert all(report.registers <= 200 for report in found), found


def test_a_larger_shrink_with_its_router_fits_the_smallest_shared_memory():
    check(reports(routed_kernels, 120, LARGE, BF16), 120, {"routed_shrink_kernel", "expand_kernel"}, "HMMA")


def test_a_dense_layer_fits_without_spills():
    dense = replace(USUAL, rank=16, k=None)
    check(reports(mixture_kernels, "triton_concat", 90, dense, BF16), 90, TRAINING, "HGMMA")


def test_a_larger_layer_fits_the_smallest_shared_memory():
    found = reports(mixture_kernels, "triton_concat", 120, LARGE, BF16, bias=True, backward=False)
    check(found, 120, FORWARD, "HMMA")


@pytest.mark.parametrize(("arch", "shape"), [(90, Shape(1, 256, 512)), (120, replace(LARGE, rows=64))])
def test_decode_kernels_fit_without_spills(arch, shape):
    check(reports(mixture_kernels, "triton_concat", arch, shape, BF16, backward=False), arch, DECODE, "HMMA")


def test_grouped_kernels_fit_without_spills():
    many = replace(USUAL, n_experts=64, rank=16)
    check(reports(mixture_kernels, "triton_grouped", 90, many, BF16), 90, GROUPED, "H")


def test_slot_kernels_fit_without_spills():
    check(reports(slot_kernels, 90, Shape(700, 256, 256, 64, 48), BF16), 90, GROUPED, "H")


def test_odd_sizes_and_a_single_slot_compile():
    """The JIT turns strides of 1 into constants, and loads that are not aligned into narrow ones, which may spill."""
    odd = Shape(333, 523, 111, 5, 3, 1)
    for engine, names in (("triton_concat", FORWARD), ("triton_grouped", GROUPED_FORWARD)):
        found = reports(mixture_kernels, engine, 90, odd, BF16, backward=False)
        assert {report.name for report in found} == names


@pytest.mark.parametrize(("engine", "names"), [("triton_concat", FORWARD), ("triton_grouped", GROUPED_FORWARD)])
def test_fp32_rows_are_multiplied_exactly(engine, names):
    found = reports(mixture_kernels, engine, 90, replace(USUAL, n_experts=64), torch.float32, backward=False)
    check(found, 90, names)
    assert not any(report.matrix_ops for report in found)


def test_another_number_of_rows_compiles_nothing():
    """Row counts are not specialised: the same kernels serve 4097 and 8192 rows."""
    one, other = (
        reports(mixture_kernels, "triton_concat", 90, replace(USUAL, rows=n), BF16, backward=False)
        for n in (4097, 8192)
    )
    assert one == other


def test_the_report_sees_spills(monkeypatch):
    """Twice the columns in one tile is what the launchers avoid: it must not pass."""
    monkeypatch.setattr(launches, "shrink_sizes", lambda *_: thin.Sizes(64, 128, 64, 4, 3))
    found = reports(mixture_kernels, "triton_concat", 80, LARGE, BF16, backward=False)
    with pytest.raises(AssertionError, match="shrink_kernel"):
        check(found, 80, FORWARD)
