"""Which engine runs a low-rank mixture: static, from shapes and device alone, and always reportable."""

from __future__ import annotations

from types import ModuleType

import torch

from ..errors import BackendError, unknown_name
from . import concat, sorted_rows

_MODULES: dict[str, ModuleType] = {"concat": concat, "sorted": sorted_rows}

# Up to this many columns E·r per active expert, running every expert beats sorting rows (measured, one core).
_CPU_COLUMNS = {torch.bfloat16: 110, torch.float16: 110}
_CPU_COLUMNS_WIDE = 50


def engines() -> dict[str, str | None]:
    """Return every engine's name with None if it can run here, else the reason why not and what to install.

    Returns:
        One entry for each engine; a reason is one sentence.
    """
    return {name: why_not(name) for name in _MODULES}


def why_not(name: str) -> str | None:
    """Return why an engine cannot run here, or None if it can."""
    return None


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
    if torch.device(device).type != "cpu":
        return "concat"
    if k >= n_experts:  # every row has every expert: nothing to skip
        return "concat"
    narrow = dtype in _CPU_COLUMNS and has_native_matmul(dtype)
    columns = _CPU_COLUMNS[dtype] if narrow else _CPU_COLUMNS_WIDE
    return "concat" if n_experts * rank <= columns * k else "sorted"


def has_native_matmul(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of a 16-bit dtype in hardware; others emulate, slowly."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


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
    return _MODULES[name]
