"""Which engine runs a low-rank mixture: static, from shapes and device alone, and always reportable."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ..errors import BackendError, unknown_name

# Engine → module; a module is imported when its engine is first used or asked about.
_MODULES = {
    "concat": "concat",
    "sorted": "sorted_rows",
    "triton_concat": "triton_low_rank",
    "triton_grouped": "triton_grouped",
    "grouped_mm": "grouped_mm",
    "megablocks": "megablocks",
}
# Engines whose products are torch's own on a CPU.
PLAIN = ("concat", "sorted")

# Up to this many columns E·r per active expert, running every expert beats sorting rows: measured on one CPU core,
# modelled (not measured) for GPUs from the ratio of their arithmetic to their bandwidth.
_CPU_COLUMNS = {torch.bfloat16: 110, torch.float16: 110}
_CPU_COLUMNS_WIDE = 50
_GPU_COLUMNS = {8: 180}
_GPU_COLUMNS_LATEST = 300
_GPU_COLUMNS_ALWAYS = 256


def engines() -> dict[str, str | None]:
    """Return every engine's name with None if it can run here, else the reason why not and what to install.

    Returns:
        One entry for each engine; a reason is one sentence.
    """
    return {name: why_not(name) for name in _MODULES}


@functools.cache
def why_not(name: str) -> str | None:
    """Return why an engine cannot run here, or None if it can."""
    if name in PLAIN:
        return None
    package = "triton" if name.startswith("triton") else name
    if package in ("triton", "megablocks") and importlib.util.find_spec(package) is None:
        return f"it needs the package {package}, which is not installed: pip install {package}."
    return _module(name).why_not()


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def choose_engine(
    n_rows: int,
    d_in: int,
    d_out: int,
    n_experts: int,
    rank: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> str:
    """Return the name of the engine that is expected to be fastest for these sizes, from static values only.

    Args:
        n_rows: T, flattened rows (tokens).
        d_in: i, input features.
        d_out: o, output features.
        n_experts: E.
        rank: r of each expert.
        k: active experts per row.
        dtype: the dtype of x.
        device: where x lives.

    Returns:
        One of the names of `engines()` that can run here; no value of any tensor is read.

    Source: crossover measured on CPU; see `experiments/bench/kernels.py`.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return _choose_cuda(n_rows, n_experts, rank, k, dtype, device)
    if device.type != "cpu" or k >= n_experts:  # a dense routing: nothing to skip
        return "concat"
    narrow = dtype in _CPU_COLUMNS and has_native_matmul(dtype)
    columns = _CPU_COLUMNS[dtype] if narrow else _CPU_COLUMNS_WIDE
    return "concat" if n_experts * rank <= columns * k else "sorted"


def _choose_cuda(n_rows: int, n_experts: int, rank: int, k: int, dtype: torch.dtype, device: torch.device) -> str:
    if dtype == torch.float64 or why_not("triton_concat") is not None:
        return "concat"
    if k >= n_experts:
        return "triton_concat"
    major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 9
    columns = max(_GPU_COLUMNS_ALWAYS, _GPU_COLUMNS.get(major, _GPU_COLUMNS_LATEST) * k)
    few = n_rows * k < n_experts  # most experts would be read for nothing
    dense = n_experts * rank <= (_GPU_COLUMNS_ALWAYS if few else columns)
    return "triton_concat" if dense else "triton_grouped"


def has_native_matmul(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of a 16-bit dtype in hardware; others emulate, slowly."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def is_emulated(x: Tensor) -> bool:
    """Return whether products in the dtype of x (T, i) are formed in software here: such run in fp32 instead."""
    return x.device.type == "cpu" and x.dtype in _CPU_COLUMNS and not has_native_matmul(x.dtype)


@functools.cache
def get_engine(name: str) -> ModuleType:
    """Return the module that implements an engine.

    Raises:
        BackendError: the name is not known, or the engine cannot run here (the reason is in the text).
    """
    if name not in _MODULES:
        raise BackendError(unknown_name("engine", name, _MODULES, "moa.kernels"))
    reason = why_not(name)
    if reason is not None:
        raise BackendError(f"engine {name!r} cannot run here: {reason}")
    return _module(name)
