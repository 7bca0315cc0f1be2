"""A mixture of few rows, as in decoding and short training steps, where the number of calls is what costs.

A sparse routing is made dense, (T, E) weights with 0 where an expert is not chosen: no gather, no scatter of
rank-sized values. All of it is PyTorch's own, so that its gradients are, too: a node of the graph that is written in
Python costs more than these products. `concat.py` offers this as the ability "few_rows".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat import own_view
from .dtypes import cast, cast_all
from .engine import Operands
from .scale import scale

# From this many rows on, casting whole weights to fp32 costs less than an emulated product.
_CAST_PAYS = 4


def few_rows(operands: Operands, scaling: float, dtype: torch.dtype) -> Tensor:
    """Return y (*rows, o) in x's dtype, its mixture times scaling formed in a dtype. One row reads its own experts.

    Args:
        operands: x (*rows, i); weights and indices (*wrows, K) broadcast against its rows.
        scaling: s.
        dtype: of the products.

    Raises:
        IndexError, RuntimeError: an index names no expert, or rows do not fit; they are not checked before.
    """
    x, a, b, weights, indices, base, bias = operands
    rows, graded = x.shape[:-1], torch.is_grad_enabled()
    n_rows = rows.numel()
    if indices is not None and n_rows == 1:
        chosen = indices.reshape(-1)
        a, b = a.index_select(0, chosen), b.index_select(0, chosen)  # (K, r, i), (K, r, o)
    elif indices is not None:  # (*wrows, E), repeated experts add
        weights = weights.new_zeros((*weights.shape[:-1], a.shape[0])).scatter_add_(-1, indices, weights)
    narrow = x.dtype != dtype or a.dtype != dtype or b.dtype != dtype
    onto_base = base is not None and base.dtype == dtype and not narrow
    flat = x if x.ndim == 2 or (onto_base and not graded) else x.reshape(n_rows, x.shape[-1])  # (T, i)
    inner, down, up = cast_all(dtype, flat, a, b) if narrow else (flat, a, b)
    down, up = down.flatten(0, 1), up.flatten(0, 1)  # (E·r, i), (E·r, o)
    hidden = F.linear(inner, down).view((*rows, a.shape[0], a.shape[1]))  # (*rows, E, r)
    mixed = scale(hidden, weights, not graded).view(n_rows, down.shape[0])  # (T, E·r)
    if not onto_base:
        y = _onto_base(flat, inner, mixed, up, base, bias, scaling)
        return y if x.ndim == 2 else own_view(y, (*rows, y.shape[-1]))
    assert base is not None
    if graded:
        y = torch.addmm(F.linear(flat, base, bias), mixed, up, alpha=scaling)
        return y if x.ndim == 2 else y.view((*rows, y.shape[1]))
    y = F.linear(x, base, bias)  # no view itself: autograd would refuse to add in place to one that it has not seen
    y.view(n_rows, up.shape[1]).addmm_(mixed, up, alpha=scaling)
    return y


def _onto_base(
    flat: Tensor, inner: Tensor, mixed: Tensor, up: Tensor, base: Tensor | None, bias: Tensor | None, scaling: float
) -> Tensor:
    """Return the base's product of rows (T, i), if there is a base, plus scaling · mixed up, in the rows' dtype."""
    if base is None:
        y = cast(mixed @ up if scaling == 1 else (mixed @ up).mul_(scaling), flat.dtype)
        return y if bias is None else y.add_(cast(bias, y.dtype))
    if up.dtype == flat.dtype:
        base, bias = cast_all(up.dtype, base, bias)
        return torch.addmm(F.linear(flat, base, bias), mixed, up, alpha=scaling)
    late = up.dtype if len(flat) >= _CAST_PAYS else flat.dtype
    base, bias = cast_all(late, base, bias)
    return cast(torch.add(F.linear(cast(flat, late), base, bias), mixed @ up, alpha=scaling), flat.dtype)
