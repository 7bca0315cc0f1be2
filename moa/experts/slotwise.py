"""Small tensors of the experts that a row chose, without a loop over experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..types import Routing


def slots(routing: Routing, *tensors: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield for each slot its weights (*rows, 1) and the tensors of the experts in it, (*rows, …) of (E, …).

    Args:
        routing: of K slots; without indices slot k is expert k on every row, and its tensors have no row axes.
        tensors: (E, …) each.
    """
    for slot in range(routing.k):
        weight = routing.weights[..., slot, None]
        if routing.indices is None:
            yield weight, [tensor[slot] for tensor in tensors]
        else:
            chosen = routing.indices[..., slot]
            yield weight, [tensor[chosen] for tensor in tensors]


def mixed_rows(routing: Routing, vectors: Tensor) -> Tensor:
    """Return Σ_e w_e v_e, (*rows, d), of vectors (E, d).

    All E are multiplied, unchosen ones by 0: writing (*rows, d) takes longer than the product with (E, d).
    """
    return routing.dense().to(vectors.dtype) @ vectors
