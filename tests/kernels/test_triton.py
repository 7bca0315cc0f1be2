"""Triton kernels without a GPU: interpreted against the truth, and compiled ahead of time for four architectures.

Run: pytest tests/kernels/test_triton.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moa.kernels import triton_decode as decode
from moa.kernels import triton_grouped as grouped
from moa.kernels import triton_kernels as kernels
from moa.kernels import triton_low_rank as low_rank

from .aot import ARCHITECTURES, SHARED_LIMIT, Report, compile_kernel

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["concat", "other"])
def test_every_kernel_equals_the_truth_in_the_interpreter(part):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    chosen = "triton_concat" if part == "concat" else "not triton_concat"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted.py", "-k"]
    done = subprocess.run([*command, chosen], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


BF16 = {"x_ptr": "*bf16", "a_ptr": "*bf16", "b_ptr": "*bf16", "factor_ptr": "*bf16", "out_ptr": "*bf16"}
POINTERS = {
    **BF16,
    **dict.fromkeys(("hidden_ptr", "mixed_ptr", "grad_ptr", "grad_hidden_ptr", "values_ptr", "right_ptr"), "*bf16"),
    **dict.fromkeys(("weights_ptr", "grad_weights_ptr", "parts_ptr"), "*fp32"),
    **dict.fromkeys(("indices_ptr", "order_ptr", "offsets_ptr", "ends_ptr"), "*i64"),
    "left_ptr": "*bf16",
}


def tiles(size: kernels.Sizes) -> dict[str, object]:
    return {"BLOCK_T": size.block_t, "BLOCK_C": size.block_c, "BLOCK_D": size.block_d}


def specialised(kernel, constants: dict[str, object]) -> dict[str, object]:
    """Keep the constants that the kernel has."""
    return {name: value for name, value in constants.items() if name in kernel.arg_names}


def build(name: str, arch: int, n_experts: int = 8, rank: int = 8, k: int = 2, n_rows: int = 8192, **extra):
    """Compile a kernel with the sizes that its launcher picks for d = 4096 and these numbers."""
    columns = n_experts * rank
    shrink, expand = low_rank.shrink_sizes(n_rows, columns, 2), low_rank.expand_sizes(n_rows, columns, 2)
    gram, one = low_rank.gram_sizes(columns, 2), kernels.Sizes
    block_c = min(64, max(16, rank))
    kernel, size, pointers = {
        "shrink": (kernels.shrink_kernel, shrink, {}),
        "expand": (kernels.expand_kernel, expand, {}),
        "unmix": (kernels.unmix_kernel, shrink, {}),
        "gram": (kernels.gram_kernel, gram, {"out_ptr": "*fp32"}),
        "add_splits": (kernels.add_splits_kernel, one(0, 0, 0, 4, 3), {}),
        "decode shrink": (decode.partial_shrink_kernel, decode.shrink_sizes(min(n_rows, 64), 2), {}),
        "decode expand": (decode.gated_expand_kernel, decode.expand_sizes(min(n_rows, 64), columns, 2), {}),
        "grouped shrink": (grouped.grouped_shrink_kernel, one(64, block_c, 64, 4, 3), {}),
        "grouped expand": (grouped.grouped_expand_kernel, one(64, block_c, 128, 4, 2), {}),
        "grouped gram": (grouped.grouped_gram_kernel, one(64, block_c, 128, 4, 3), {"out_ptr": "*fp32"}),
        "combine": (grouped.combine_kernel, one(0, 0, 1024, 4, 3), {"parts_ptr": "*bf16"}),
        "add_chunks": (grouped.add_chunks_kernel, one(0, 0, 0, 4, 3), {}),
    }[name]
    constants = {
        **{"COLUMNS": columns, "RANK": rank, "K": k, "N_EXPERTS": n_experts, "EXPERTS": n_experts},
        **{"DENSE": False, "EVEN": True, "PRECISION": "ieee", "HAS_BIAS": True, "CHUNK": 512, "BLOCK": 1024},
        **{"NEED_HIDDEN": True, "NEED_MIXED": True, "NEED_WEIGHTS": True},
        **tiles(size),
        **extra,
    }
    types = {**POINTERS, "bias_ptr": "*bf16", **pointers}
    types = {key: value for key, value in types.items() if key in kernel.arg_names}
    return compile_kernel(kernel, types, specialised(kernel, constants), arch, size.warps, size.stages)


# The JIT warns once when nobody says whether products and sums may fuse; it is triton's default that is tested.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
MATRIX_OP = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}


def check(report: Report, name: str, arch: int, matrix_op: str | None) -> None:
    assert report.spills == 0 and report.local == 0, (name, report)
    assert report.shared <= SHARED_LIMIT[arch], (name, report)
    assert matrix_op is None or any(op.startswith(matrix_op) for op in report.tensor_ops), (name, report)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_training_kernels_fit_without_spills(arch):
    """The shapes of a usual layer (8 experts of rank 8) on every architecture."""
    for name in ("shrink", "expand", "unmix", "gram"):
        report = build(name, arch)
        check(report, name, arch, MATRIX_OP[arch])
        assert report.registers <= 200, (name, report)


@pytest.mark.parametrize("arch", [90, 120])
def test_larger_layers_fit_without_spills(arch):
    """16 experts of rank 16; and 8 of rank 16 with 4 active."""
    for name in ("shrink", "expand", "unmix"):
        check(build(name, arch, n_experts=16, rank=16), name, arch, MATRIX_OP[arch])
    check(build("unmix", arch, rank=16, k=4), "unmix", arch, MATRIX_OP[arch])


@pytest.mark.parametrize("arch", [90, 120])
def test_decode_kernels_fit_without_spills(arch):
    for name in ("decode shrink", "decode expand"):
        check(build(name, arch, n_rows=16), name, arch, "HMMA")
        check(build(name, arch, n_rows=64, n_experts=16, rank=16), name, arch, None)


@pytest.mark.parametrize("arch", [90, 120])
def test_grouped_kernels_fit_without_spills(arch):
    for name in ("grouped shrink", "grouped expand", "grouped gram"):
        check(build(name, arch, n_experts=64, rank=16), name, arch, None)


def test_kernels_without_products_compile():
    for name in ("add_splits", "combine", "add_chunks"):
        check(build(name, 90), name, 90, None)


def test_strides_of_one_compile_and_row_counts_stay_variables():
    """The JIT turns run-time integers of value 1 into constants."""
    for name in ("decode expand", "shrink", "grouped gram"):
        report = build(name, 90, n_rows=1, k=1, stride_wt=1, stride_wk=1, stride_it=1, stride_ik=1)
        check(report, name, 90, None)
    for kernel in (kernels.shrink_kernel, kernels.expand_kernel, kernels.unmix_kernel, kernels.gram_kernel):
        assert all(p.do_not_specialize == (p.name in ("n_rows", "rows_per_split")) for p in kernel.params)


def test_wide_rows_in_fp32_fit(arch=90):
    pointers = {**dict.fromkeys(("mixed_ptr", "factor_ptr", "out_ptr"), "*fp32")}
    size = low_rank.expand_sizes(8192, 64, 4)
    constants = {"bias_ptr": None, "COLUMNS": 64, "HAS_BIAS": False, "PRECISION": "ieee", **tiles(size)}
    report = compile_kernel(kernels.expand_kernel, pointers, constants, arch, size.warps, size.stages)
    check(report, "expand fp32", arch, None)


def test_the_report_sees_spills():
    """Twice the columns in one tile is what the launchers avoid: it must not pass."""
    too_wide = {"BLOCK_C": 256, "BLOCK_T": 64}
    with pytest.raises(AssertionError, match="shrink"):
        check(build("shrink", 80, n_experts=16, rank=16, **too_wide), "shrink", 80, "HMMA")
