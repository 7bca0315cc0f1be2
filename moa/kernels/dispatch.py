"""Which engine runs a mixture: chosen here and nowhere else, from static values, so that it can be reported."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat import has_native_matmul
from .engine import Ability, abilities, get_engine, register_engine, why_not

_TRITON = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
register_engine("concat", f"{__package__}.concat")
register_engine("sorted", f"{__package__}.sorted_rows")
register_engine("triton_concat", f"{__package__}.triton.triton_concat", devices=_TRITON, package="triton")
register_engine("triton_grouped", f"{__package__}.triton.triton_grouped", devices=_TRITON, package="triton")
register_engine("grouped_mm", f"{__package__}.grouped_mm")
register_engine("megablocks", f"{__package__}.megablocks", devices=("cuda",), package="megablocks")

# Up to this many columns E·r per active expert, running every expert beats sorting rows: measured on one CPU core,
# modelled (not measured) for GPUs from the ratio of their arithmetic to their bandwidth.
_CPU_COLUMNS = {torch.bfloat16: 110, torch.float16: 110}
_CPU_COLUMNS_WIDE = 50
_GPU_COLUMNS = {8: 180}
_GPU_COLUMNS_LATEST = 300
_GPU_COLUMNS_ALWAYS = 256


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


class Chosen(NamedTuple):
    """An engine, what it can do beside whole mixtures, and the dtype in which it is given its operands."""

    name: str
    engine: Any
    abilities: frozenset[Ability]
    dtype: torch.dtype


def choose(name: str, x: Tensor, a: Tensor, d_out: int, k: int, ability: Ability | None = None) -> Chosen:
    """Return the engine that is named, or the one that the sizes choose.

    A CPU that multiplies 16-bit dtypes only in software does so 10 to 100 × slower: there plain engines run in fp32,
    wider and hence at least as accurate, at the price of transient fp32 copies.

    Args:
        name: of `engines()`; "" lets the sizes choose.
        x: (T, …) rows, for their number, dtype and device.
        a: (E, r, i) factors, for their sizes.
        d_out: o.
        k: active experts per row.
        ability: what the call wants beside a whole mixture. "few_rows" and "routed" are faster ways to one, which the
            caller can do without; an engine without "slots" is not chosen where they are wanted.

    Raises:
        BackendError: the name is not known, or that engine cannot run here, on this device, or has no slots.
    """
    n_rows, dtype, device = x.shape[0], x.dtype, x.device
    needed = ability if ability == "slots" else None
    if name:
        engine = get_engine(name, device.type, needed)
    else:
        n_experts, rank, d_in = a.shape
        if ability == "few_rows" and n_rows == 1 and device.type == "cpu":
            name = "concat"  # it reads the experts of a single row alone
        else:
            name = choose_engine(n_rows, d_in, d_out, n_experts, rank, k, dtype, device)
        if needed and needed not in abilities(name):
            name = "concat"
        engine = get_engine(name)
    emulated = is_emulated(x) and getattr(engine, "PLAIN", False)
    return Chosen(name, engine, abilities(name), torch.float32 if emulated else dtype)


def is_emulated(x: Tensor) -> bool:
    """Return whether products in the dtype of x (T, i) are formed in software here: such run in fp32 instead."""
    return x.device.type == "cpu" and x.dtype in _CPU_COLUMNS and not has_native_matmul(x.dtype)
