"""Launches of the thin products, with fixed tile sizes. Nothing is tuned at run time, unless asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...errors import BackendError
from . import thin, tiles
from .thin import Sizes
from .tiles import cdiv, next_power_of_2

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Programs that a split product aims at: two waves on the largest GPUs known; the same everywhere, so that sums
# have one order on every device.
_PROGRAMS = 264


def shrink_sizes(n_rows: int, columns: int, itemsize: int) -> Sizes:
    """Return the tiles of shrink and unmix: few rows get short tiles, so that the device is still filled."""
    block_t = 16 if n_rows <= 2048 else 32 if n_rows <= 4096 else 64
    # 128 columns in one tile read x once instead of twice, but spill in the epilogue on most architectures.
    block_c = min(64, max(16, next_power_of_2(columns)))
    return Sizes(block_t, block_c, 128 // itemsize, 4 if block_t == 16 else 8, 3)


def expand_sizes(n_rows: int, columns: int, itemsize: int) -> Sizes:
    """Return the tiles of expand: the columns in chunks of at most 64, where one step would spill."""
    block_t = 16 if n_rows <= 16 else 32 if n_rows <= 1024 else 128
    block_c = min(128 // itemsize, max(16, next_power_of_2(columns)))
    return Sizes(block_t, block_c, 128, 4 if block_t < 128 else 8, 3)


def gram_sizes(columns: int, itemsize: int) -> Sizes:
    """Return the tiles of a weight gradient."""
    block_c = min(64, max(16, next_power_of_2(columns)))
    return Sizes(128 // itemsize, block_c, 128, 4, 3)


def rows_of(values: Tensor) -> Tensor:
    """Return rows (T, d) with adjacent features, as they are where they are so already.

    Raises:
        BackendError: the dtype is not one that Triton kernels run in.
    """
    if values.dtype not in DTYPES:
        raise BackendError(f"Triton kernels run in {', '.join(map(str, DTYPES))}, not {values.dtype}: use 'concat'.")
    return values if values.stride(1) == 1 else values.contiguous()


def on_device(values: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the device of `values`."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()


def precision() -> str:
    """Return how fp32 products are formed: as torch's own setting for matrix products says."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def routing_strides(weights: Tensor, indices: Tensor | None) -> tuple[int, ...]:
    """Return the strides of weights and indices; rows may be broadcast with stride 0."""
    places = (0, 0) if indices is None else indices.stride()
    return (*weights.stride(), *places)


def shrink(x: Tensor, a: Tensor, weights: Tensor, indices: Tensor | None, hidden: Tensor, mixed: Tensor) -> None:
    """Write hidden (T, K, r) and mixed (T, E·r), hidden times its weight, of x (T, i) and a (E, r, i)."""
    n_rows, d = x.shape
    columns = mixed.shape[1]
    size = shrink_sizes(n_rows, columns, x.itemsize)
    if n_rows == 0:
        return
    rank, k, dense, products = a.shape[1], weights.shape[1], indices is None, precision()

    def run(size: Sizes) -> None:
        thin.shrink_kernel[(cdiv(n_rows, size.block_t) * cdiv(columns, size.block_c),)](
            x, a, weights, indices, hidden, mixed, n_rows, d, x.stride(0), *routing_strides(weights, indices),
            COLUMNS=columns, RANK=rank, K=k, DENSE=dense, EVEN=d % size.block_d == 0,
            PRECISION=products, BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d,
            **size.options,
        )  # fmt: skip

    tiles.launch("shrink", n_rows, (d, columns, rank, k, dense, str(x.dtype), products), size, run)


def expand(mixed: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Return mixed factor (+ bias), (T, d), of mixed (T, E·r) and factor (E, r, d)."""
    n_rows, columns = mixed.shape
    d = factor.shape[-1]
    out = mixed.new_empty(n_rows, d)
    size = expand_sizes(n_rows, columns, mixed.itemsize)
    if n_rows == 0:
        return out
    factor, products = factor.contiguous(), precision()

    def run(size: Sizes) -> None:
        thin.expand_kernel[(cdiv(n_rows, size.block_t), cdiv(d, size.block_d))](
            mixed, factor, bias, out, n_rows, d,
            COLUMNS=columns, HAS_BIAS=bias is not None, PRECISION=products,
            BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d,
            **size.options,
        )  # fmt: skip

    tiles.launch("expand", n_rows, (d, columns, bias is not None, str(mixed.dtype), products), size, run)
    return out


def unmix(
    grad: Tensor,
    b: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    hidden: Tensor | None,
    need_hidden: bool,
    need_mixed: bool,
    need_weights: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return grad_hidden (T, E·r), mixed (T, E·r) and grad_weights (T, K), each None where it is not needed."""
    n_rows, k = weights.shape
    rank, d = b.shape[1:]
    columns = b.shape[0] * rank
    size = shrink_sizes(n_rows, columns, grad.itemsize)
    blocks = cdiv(columns, size.block_c)
    grad_hidden = grad.new_empty(n_rows, columns) if need_hidden else None
    mixed = grad.new_empty(n_rows, columns) if need_mixed else None
    parts = grad.new_empty(blocks, n_rows, k, dtype=torch.float32) if need_weights else None
    dense, needs, products = indices is None, (need_hidden, need_mixed, need_weights), precision()

    def run(size: Sizes) -> None:
        thin.unmix_kernel[(cdiv(n_rows, size.block_t) * blocks,)](
            grad, b, weights, indices, hidden, grad_hidden, mixed, parts, n_rows, d, grad.stride(0),
            *routing_strides(weights, indices),
            COLUMNS=columns, RANK=rank, K=k, DENSE=dense,
            NEED_HIDDEN=need_hidden, NEED_MIXED=need_mixed, NEED_WEIGHTS=need_weights,
            EVEN=d % size.block_d == 0, PRECISION=products,
            BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d,
            **size.options,
        )  # fmt: skip

    if n_rows:
        tiles.launch("unmix", n_rows, (d, columns, rank, k, dense, *needs, str(grad.dtype), products), size, run)
    grad_weights = None
    if parts is not None:
        grad_weights = (parts[0] if blocks == 1 else parts.sum(0)).to(weights.dtype)
    return grad_hidden, mixed, grad_weights


def gram(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Return leftᵀ right (E, r, d) from left (T, E·r) and right (T, d), split over rows and added in order."""
    n_rows, columns = left.shape
    d = right.shape[1]
    size = gram_sizes(columns, left.itemsize)
    programs = cdiv(d, size.block_d) * cdiv(columns, size.block_c)
    splits = max(1, min(_PROGRAMS // programs, cdiv(n_rows, 4 * size.block_t)))
    rows_per_split = cdiv(cdiv(n_rows, splits), size.block_t) * size.block_t
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    parts = out if splits == 1 else left.new_empty(splits, columns, d, dtype=torch.float32)
    thin.gram_kernel[(cdiv(d, size.block_d), cdiv(columns, size.block_c), splits)](
        left, right, parts, n_rows, d, right.stride(0), rows_per_split,
        COLUMNS=columns, PRECISION=precision(),
        BLOCK_T=size.block_t, BLOCK_C=size.block_c, BLOCK_D=size.block_d,
        **size.options,
    )  # fmt: skip
    if splits > 1:
        total, block = out.numel(), 1024
        thin.add_splits_kernel[(cdiv(total, block),)](parts, out, total, splits, BLOCK=block, **thin.FUSED)
    return out
