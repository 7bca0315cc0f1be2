"""A weight change of a few entries on rows: sums over its entries in place of a product with all of the weight.

PyTorch's `embedding_bag` sums weighted rows in registers: with x transposed, an output is a bag of inputs. The gradient
of the entries is a product that is formed at them only, `sampled_addmm`, so that none (o, i) is.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import cast, wide

_BLOCK = 192  # rows that are transposed at a time: x and y of so many stay in a cache of the second level


class Order(NamedTuple):
    """The entries of E matrices (o, i) in two orders, all int32.

    Args:
        by_row: (E, n) entry at each place, rows ascending.
        columns: (E, n) column at each of these places.
        row_starts: (E, o + 1) first of these places for each row, and n.
        by_column: (E, n) entry at each place, columns ascending.
        rows: (E, n) row at each of these places.
        column_starts: (E, i + 1) first of these places for each column, and n.
    """

    by_row: Tensor
    columns: Tensor
    row_starts: Tensor
    by_column: Tensor
    rows: Tensor
    column_starts: Tensor


def order_entries(places: Tensor, d_out: int, d_in: int) -> Order:
    """Return the orders of entries at places (E, n) of flattened matrices (o, i)."""
    rows, columns = (places // d_in).int(), (places % d_in).int()  # (E, n)
    by_row, row_starts = _sorted(rows, d_out)
    by_column, column_starts = _sorted(columns, d_in)
    read = columns.gather(1, by_row), rows.gather(1, by_column)
    return Order(by_row.int(), read[0], row_starts, by_column.int(), read[1], column_starts)


def _sorted(lines: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the order (E, n) of entries by their line, 0 … size - 1, and where each line starts, (E, size + 1)."""
    values, order = lines.sort(dim=1, stable=True)
    edges = torch.arange(size + 1, dtype=lines.dtype, device=lines.device).repeat(len(lines), 1)
    return order, torch.searchsorted(values, edges, out_int32=True)


def entry_product(x: Tensor, values: Tensor, order: Order) -> Tensor:
    """Return ΔW x, (*rows, o) of x (*rows, i), for one matrix with values (n,); sums in fp32, or in fp64 for fp64."""
    scales = _in_order(values, x, order.by_row)
    sums = [_bags(across, scales, order.columns, order.row_starts).mT for across in _blocks(x)]
    return cast(torch.cat(sums), x.dtype).view(*x.shape[:-1], len(order.row_starts) - 1)


def entry_gradients(x: Tensor, above: Tensor, values: Tensor, order: Order, to_x: bool) -> tuple[Tensor | None, Tensor]:
    """Return ΔW^T above, (*rows, i), or None, and Σ_t above[t, row] x[t, column] of each entry, (n,).

    Args:
        x: (*rows, i).
        above: (*rows, o).
        values: (n,).
        order: of one matrix.
        to_x: whether the first is wanted.
    """
    scales = _in_order(values, x, order.by_column) if to_x else None
    backs, total = [], None
    for inputs, outputs in zip(_blocks(x), _blocks(above), strict=True):  # (i, block), (o, block)
        if scales is not None:
            backs.append(_bags(outputs, scales, order.rows, order.column_starts).mT)
        found = _at_entries(outputs, inputs, order)
        total = found if total is None else total.add_(found)
    assert total is not None  # of (0, i), there is one empty block
    to_values = torch.empty_like(total).index_copy_(0, order.by_row.long(), total)
    return cast(torch.cat(backs), x.dtype).view_as(x) if to_x else None, to_values


def _in_order(values: Tensor, x: Tensor, order: Tensor) -> Tensor:
    """Return values (n,) in an order, in the dtype that the sums over x's rows are formed in."""
    return cast(values, wide(x.dtype)).index_select(0, order)


def _blocks(x: Tensor) -> list[Tensor]:
    """Return x (*rows, d) in blocks, each transposed, (d, block)."""
    dtype = wide(x.dtype)
    blocks = x.flatten(0, -2).split(_BLOCK)
    return [block.new_empty(block.shape[::-1], dtype=dtype).copy_(block.mT) for block in blocks]


def _bags(across: Tensor, scales: Tensor, read: Tensor, starts: Tensor) -> Tensor:
    """Return the sums of scaled rows of x^T (d, T), one for each stretch of the entries (n,), (lines, T)."""
    sums: Tensor = torch.embedding_bag(across, read, starts, False, 0, False, scales, True)[0]
    return sums


def _at_entries(outputs: Tensor, inputs: Tensor, order: Order) -> Tensor:
    """Return (Y X^T) at the entries, (n,) by row, of Y (o, T) and X (i, T)."""
    _spend_the_warning()
    zero = outputs.new_zeros(len(order.columns))
    size = (len(outputs), len(inputs))
    at = torch.sparse_csr_tensor(order.row_starts, order.columns, zero, size, check_invariants=False)
    found: Tensor = torch.sparse.sampled_addmm(at, outputs, inputs.mT, beta=0.0).values()
    return found


@functools.cache
def _spend_the_warning() -> None:
    """Make a first tensor of that layout: once a process, PyTorch says that it is in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), (1, 1))
