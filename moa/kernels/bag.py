"""The way up as a weighted bag of rows: Σ_j v_j factors[e_j] reads K·r rows of the factors and skips the other experts.

PyTorch's `embedding_bag` sums weighted rows in registers. A product over all E·r columns does E / K times its work at
two to three times its rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on one CPU core: rows of a bag up to which it is faster than products over sorted rows, and experts per
# active one from which it is faster than one product over all of them.
_MOST_ROWS = 32
_LEAST_EXPERTS = 3


def pays(values: Tensor, n_experts: int) -> bool:
    """Return whether `expand` is the fastest way for values (T, K, r) here: fp32 on a CPU, thin and sparse."""
    _, k, rank = values.shape
    fits = values.dtype == torch.float32 and values.device.type == "cpu"
    return fits and k * rank <= _MOST_ROWS and n_experts >= _LEAST_EXPERTS * k


def expand(values: Tensor, indices: Tensor, factors: Tensor) -> Tensor:
    """Return Σ_j values[t, j] factors[e_j], (T, d), new.

    Args:
        values: (T, K, r).
        indices: (T, K) int64 expert of each slot; repeated ones add.
        factors: (E, r, d).
    """
    n_rows, k, rank = values.shape
    chosen = (indices * rank).unsqueeze(-1) + torch.arange(rank, device=indices.device)
    starts = torch.arange(0, n_rows * k * rank, k * rank, device=indices.device)
    rows = factors.flatten(0, 1)
    total: Tensor = torch.embedding_bag(rows, chosen.view(-1), starts, False, 0, False, values.reshape(-1))[0]
    return total
