"""A mixture of few rows, as in decoding and short training steps, where the number of calls is what costs.

A sparse routing is made dense, (T, E) weights with 0 where an expert is not chosen: no gather, no scatter of
rank-sized values. All of it is PyTorch's own, so that its gradients are, too: a node of the graph that is written in
Python costs more than these products. `concat.py` offers this as the ability "few_rows".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import cast, cast_all
from .engine import Operands
from .scale import scale

# From this many rows on, casting whole weights to fp32 costs less than an emulated product.
_CAST_PAYS = 4


def few_rows(operands: Operands, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return y (T, o) in x's dtype, its mixture times scaling formed in a dtype. One row reads its own experts alone.

    Raises:
        IndexError, RuntimeError: an index names no expert.
    """
    x, a, b, weights, indices = operands.x, operands.a, operands.b, operands.weights, operands.indices
    n_rows = len(x)
    if indices is not None and n_rows == 1:
        chosen = indices.view(-1)
        a, b = a.index_select(0, chosen), b.index_select(0, chosen)  # (K, r, i), (K, r, o)
    elif indices is not None:
        weights = weights.new_zeros(n_rows, len(a)).scatter_add(1, indices, weights)  # (T, E), repeated experts add
    hidden = F.linear(cast(x, dtype), cast(a, dtype).flatten(0, 1)).view(n_rows, *a.shape[:2])  # (T, E, r)
    mixed = scale(hidden, weights, onto_itself=not torch.is_grad_enabled()).flatten(1)  # (T, E·r)
    up, base, bias = cast(b, dtype).flatten(0, 1), operands.base, operands.bias  # (E·r, o)
    if base is None:
        y = cast(mixed @ up if scaling == 1 else (mixed @ up).mul_(scaling), x.dtype)
        return y if bias is None else y.add_(cast(bias, y.dtype))
    if dtype == x.dtype:
        base, bias = cast_all(dtype, base, bias)
        return torch.addmm(F.linear(x, base, bias), mixed, up, alpha=scaling)
    late = dtype if n_rows >= _CAST_PAYS else x.dtype
    base, bias = cast_all(late, base, bias)
    return cast(torch.add(F.linear(cast(x, late), base, bias), mixed @ up, alpha=scaling), x.dtype)
