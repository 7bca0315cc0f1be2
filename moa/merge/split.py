"""Adapters cut into parts and put together again: MoSA's disjoint masks, Break-for-Make's halves.

MoSA (arXiv 2312.02923); Break-for-Make (arXiv 2403.19456).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..delta import LowRank
from ..errors import ConfigError, ShapeError, unknown_name

AXES = ("entries", "rows", "columns")


def partition_masks(shape: Sequence[int], n: int, *, by: str = "entries", seed: int = 0) -> Tensor:
    """Return n disjoint masks that cover a matrix, each entry in exactly one, as equal in size as can be.

    Args:
        shape: (a, b) of the weight.
        n: number of parts, ≥ 1.
        by: "entries" deals all entries out at random; "rows" deals within each row, "columns" within each column.
        seed: of the random scores.

    Returns:
        (n, a, b) bool.

    Raises:
        ConfigError: n below 1 or an unknown `by`.
        ShapeError: not a matrix.

    Source: Zhang et al. 2023, arXiv 2312.02923 (split).
    """
    if by not in AXES:
        raise ConfigError(unknown_name("by", by, AXES, "partition_masks"))
    if n < 1:
        raise ConfigError(f"partition_masks: n is {n}, expected at least 1.")
    if len(shape) != 2:
        raise ShapeError(f"partition_masks: expected a matrix (a, b), got {tuple(shape)}.")
    score = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # The rank of each score among its peers, cut into n equal runs.
    if by == "entries":
        rank = score.reshape(-1).argsort().argsort().view(score.shape)
        size = score.numel()
    else:
        axis = 1 if by == "rows" else 0
        rank = score.argsort(dim=axis).argsort(dim=axis)
        size = score.shape[axis]
    part = rank * n // max(size, 1)
    return torch.stack([part == p for p in range(n)])


def join_masked(copies: Sequence[Tensor], masks: Tensor) -> Tensor:
    """Return the weight whose every entry comes from the copy that owns it: Σ_p m_p ⊙ w_p.

    Args:
        copies: n weights (a, b).
        masks: (n, a, b) bool, disjoint and covering: see `partition_masks`.

    Returns:
        (a, b), each entry bit for bit its owner's.

    Raises:
        ShapeError: the masks do not fit the copies.
        ConfigError: the masks overlap or leave an entry to nobody.

    Source: Zhang et al. 2023, arXiv 2312.02923 (merge, "joint" in the code).
    Differs: the released code also divides by n, which shrinks every weight n times; not done here.
    """
    if tuple(masks.shape) != (len(copies), *copies[0].shape) or any(c.shape != copies[0].shape for c in copies):
        shapes = [tuple(c.shape) for c in copies]
        raise ShapeError(f"join_masked: masks {tuple(masks.shape)} for copies {shapes}; expected (n, a, b).")
    if not bool((masks.sum(0) == 1).all()):
        raise ConfigError("join_masked: the masks overlap or leave entries out; each entry needs exactly one owner.")
    joined = copies[0].clone()
    for copy, mask in zip(copies[1:], masks[1:], strict=True):
        joined = torch.where(mask, copy, joined)
    return joined


def average_copies(copies: Sequence[Tensor]) -> Tensor:
    """Return the mean of n copies of a weight: the expectation of a copy drawn uniformly.

    Args:
        copies: n weights of one shape (a, b).

    Returns:
        (a, b), a new tensor.

    Raises:
        ConfigError: no copies.
        ShapeError: shapes differ.

    Source: Zhang et al. 2023, arXiv 2312.02923 (merge, "add" in the code).
    """
    if not copies:
        raise ConfigError("average_copies: no copies given.")
    if len({tuple(c.shape) for c in copies}) > 1:
        raise ShapeError(f"average_copies: the copies have shapes {sorted({tuple(c.shape) for c in copies})}.")
    return torch.stack(list(copies)).mean(0)


def recompose(content: LowRank, style: LowRank, *, frozen_in: Tensor, frozen_out: Tensor) -> LowRank:
    """Return the style adapter with the content adapter's trained half of `down`.

    Both adapters keep the inputs `frozen_in` of down and the outputs `frozen_out` of up at one shared random basis;
    only the other halves were trained. The result takes down's trained columns from content, all else from style.

    Args:
        content: down (r, i), up (o, r).
        style: the same shapes.
        frozen_in: (i,) bool, True on the frozen columns of down.
        frozen_out: (o,) bool, True on the frozen rows of up.

    Returns:
        New factors; each entry is bit for bit its donor's.

    Raises:
        ShapeError: factors or masks of different shapes.
        ConfigError: the frozen halves differ: the adapters were trained in different bases.

    Source: Xu et al. 2024, arXiv 2403.19456 (second stage).
    """
    if content.down.shape != style.down.shape or content.up.shape != style.up.shape:
        raise ShapeError(
            f"recompose: the factors have shapes {tuple(content.down.shape)}, {tuple(content.up.shape)} and "
            f"{tuple(style.down.shape)}, {tuple(style.up.shape)}; they must be equal."
        )
    o, i = style.shape
    if frozen_in.shape != (i,) or frozen_out.shape != (o,):
        raise ShapeError(
            f"recompose: frozen_in {tuple(frozen_in.shape)} and frozen_out {tuple(frozen_out.shape)}; expected "
            f"({i},) and ({o},)."
        )
    same_down = torch.equal(content.down[:, frozen_in], style.down[:, frozen_in])
    if not same_down or not torch.equal(content.up[frozen_out], style.up[frozen_out]):
        raise ConfigError(
            f"recompose: the frozen half of {'up' if same_down else 'down'} differs between the two adapters: they "
            "were trained in different random bases (another seed, or another scale), and their halves do not fit."
        )
    return LowRank(torch.where(frozen_in, style.down, content.down), style.up.clone())
