"""Which engine runs a low-rank mixture: static, from shapes and device alone, and always reportable."""

from __future__ import annotations

from types import ModuleType

import torch

from ..errors import BackendError, unknown_name
from . import concat

NAMES = ("concat",)

# Up to this many columns E·r per active expert, running every expert beats sorting rows (measured, one core).
_DENSE_COLUMNS_PER_SLOT = {torch.bfloat16: 110, torch.float16: 110, torch.float32: 50, torch.float64: 50}


def engines() -> dict[str, str | None]:
    """Return every engine's name with None if it can run here, else the reason why not and what to install.

    Returns:
        Names in order of preference; a reason is one sentence.
    """
    return {name: why_not(name) for name in NAMES}


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
        dtype: the dtype the products run in.
        device: where x lives.

    Returns:
        One of the names of `engines()` that can run here; no value of any tensor is read.

    Source: crossover measured on CPU and modelled for GPU; see `experiments/bench/kernels.py`.
    """
    return "concat"


def get_engine(name: str) -> ModuleType:
    """Return the module that implements an engine.

    Raises:
        BackendError: the name is not known, or the engine cannot run here (the reason is in the text).
    """
    if name not in NAMES:
        raise BackendError(unknown_name("engine", name, NAMES, "moa.kernels"))
    reason = why_not(name)
    if reason is not None:
        raise BackendError(f"engine {name!r} cannot run here: {reason}")
    return concat
