"""Values times weights, where a weight of 0 means that nothing comes through, not even infinity."""

from __future__ import annotations

import math

from torch import Tensor


def scale(values: Tensor, weights: Tensor, onto_itself: bool = False) -> Tensor:
    """Return values (T, K, r) times weights (T, K) in values' dtype, new or in place; exactly 0 where a weight is 0."""
    gate = weights.unsqueeze(-1)
    # The product is formed in the wider dtype, so that fp32 weights round once.
    scaled = values.mul_(gate) if onto_itself else values * gate
    # 0 · inf is NaN. Masking costs several times the product: a CPU looks first, a GPU would have to wait for it.
    if weights.device.type != "cpu":
        suspect = True
    elif len(weights) == 1 or weights.stride(0) == 0:  # Python has looked at one row before a tensor op starts
        suspect = 0.0 in weights[:1].flatten().tolist()
    else:
        suspect = math.isnan(scaled.detach().sum())
    if suspect:
        if scaled.requires_grad:  # the mask goes before the product, so that no infinity reaches a gradient either
            scaled = values.masked_fill(gate == 0, 0) * gate
        else:
            scaled.masked_fill_(gate == 0, 0)
    return scaled if scaled.dtype == values.dtype else scaled.to(values.dtype)
