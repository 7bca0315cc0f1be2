"""Which engine runs a mixture: chosen here and nowhere else, from static values, so that it can be reported."""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch

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
# Up to this many multiplications for each group of sorted rows, the calls of a group cost more than what it skips.
_CPU_CALLS = 250_000
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
    few = n_rows * n_experts * rank * (d_in + d_out) <= _CPU_CALLS * min(n_experts, n_rows * k)
    return "concat" if few or n_experts * rank <= columns * k else "sorted"


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
    """An engine, what else it can do, the dtype of its operands, and whether it takes these rows as few."""

    name: str
    engine: Any
    abilities: frozenset[Ability]
    dtype: torch.dtype
    few: bool


@functools.lru_cache(maxsize=4096)
def choose(
    name: str,
    n_rows: int,
    factors: torch.Size,
    d_out: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    ability: Ability | None = None,
) -> Chosen:
    """Return the engine that is named, or the one that the sizes choose; known at once for sizes that came before.

    A CPU that multiplies 16-bit dtypes only in software does so 10 to 100 × slower: there plain engines run in fp32,
    wider and hence at least as accurate, at the price of transient fp32 copies.

    Args:
        name: of `engines()`; "" lets the sizes choose.
        n_rows: T.
        factors: (E, r, i), the shape of the down factors.
        d_out: o.
        k: active experts per row.
        dtype: of the rows.
        device: where they live.
        ability: what the call wants beside a whole mixture. "few_rows" and "routed" are faster ways to one, which the
            caller can do without; an engine without "slots" is not chosen where they are wanted.

    Raises:
        BackendError: the name is not known, or that engine cannot run here, on this device, or has no slots.
    """
    needed = ability if ability == "slots" else None
    if name:
        engine = get_engine(name, device.type, needed)
    else:
        n_experts, rank, d_in = factors
        if ability == "few_rows" and n_rows == 1 and device.type == "cpu":
            name = "concat"  # for a single row it reads only that row's experts
        else:
            name = choose_engine(n_rows, d_in, d_out, n_experts, rank, k, dtype, device)
        if needed and needed not in abilities(name):
            name = "concat"
        engine = get_engine(name)
    emulated = getattr(engine, "PLAIN", False) and is_emulated(dtype, device)
    few = "few_rows" in abilities(name) and device.type == "cpu" and n_rows <= engine.FEW_ROWS
    return Chosen(name, engine, abilities(name), torch.float32 if emulated else dtype, few)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products in a dtype are formed in software on this device: such run in fp32 instead."""
    return device.type == "cpu" and dtype in _CPU_COLUMNS and not has_native_matmul(dtype)
