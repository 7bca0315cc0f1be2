"""The definition of a low-rank mixture: a loop over experts that reads like the formula.

Slow on purpose. Every engine is tested against it; nothing calls it at run time. Autograd differentiates it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_mixture_reference(
    x: Tensor, a: Tensor, b: Tensor, weights: Tensor, indices: Tensor | None = None
) -> Tensor:
    """Return the weighted sum of the chosen low-rank experts, one expert at a time.

    y[t] = Σ_j weights[t, j] · (x[t] a[e]ᵀ) b[e] with e = indices[t, j].

    Args:
        x: (*rows, i) inputs.
        a: (E, r, i) down factors.
        b: (E, r, o) up factors, stored transposed.
        weights: (*wrows, K) where wrows broadcasts against rows.
        indices: (*wrows, K) int64 experts of each slot; None means all of them, K = E.

    Returns:
        (*rows, o) in the dtype of x; new. An expert whose weight on a row is 0 is not read there.

    Source: Hu et al. 2021, arXiv 2106.09685, §4.1, summed over experts.
    """
    n_experts, _, d_out = b.shape
    y = x.new_zeros(*x.shape[:-1], d_out)
    for expert in range(n_experts):
        hidden = x @ a[expert].T  # (*rows, r)
        chosen = weights if indices is None else torch.where(indices == expert, weights, 0)
        gate = chosen[..., expert : expert + 1] if indices is None else chosen.sum(-1, keepdim=True)
        y = y + torch.where(gate != 0, hidden * gate, 0).to(b.dtype) @ b[expert]
    return y
