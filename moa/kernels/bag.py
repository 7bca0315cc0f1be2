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


def pays(values: Tensor, n_columns: int) -> bool:
    """Return whether `expand` is fastest here for values (T, K·r) of E·r columns: fp32 on a CPU, thin and sparse."""
    fits = values.dtype == torch.float32 and values.device.type == "cpu"
    return fits and values.shape[1] <= _MOST_ROWS and n_columns >= _LEAST_EXPERTS * values.shape[1]


def expand(values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Return Σ_j values[t, j] rows[columns[t, j]], (T, d), new.

    Args:
        values: (T, K·r).
        columns: (T, K·r) int64, as `concat.slot_columns`; repeated ones add.
        rows: (E·r, d).
    """
    starts = torch.arange(0, values.numel(), values.shape[1], device=values.device)
    total: Tensor = torch.embedding_bag(rows, columns.view(-1), starts, False, 0, False, values.view(-1))[0]
    return total
