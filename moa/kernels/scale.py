"""Values times weights, where a weight of 0 means that nothing comes through, not even infinity."""

from __future__ import annotations

from torch import Tensor


def scale(values: Tensor, weights: Tensor, onto_itself: bool = False) -> Tensor:
    """Return values (*rows, K, r) times weights in values' dtype, new or in place; exactly 0 where a weight is 0.

    Args:
        values: (*rows, K, r).
        weights: (*wrows, K), which broadcast against the rows.
        onto_itself: in place.
    """
    gate = weights.unsqueeze(-1)
    # The product is formed in the wider dtype, so that fp32 weights round once.
    scaled = values.mul_(gate) if onto_itself else values * gate
    # 0 · inf is NaN. Masking costs several times the product: a CPU looks first, a GPU would have to wait for it.
    if not weights.is_cpu:
        suspect = True
    elif weights.numel() == weights.shape[-1]:  # Python has looked at one row before a tensor op starts
        suspect = 0.0 in weights.flatten().tolist()
    elif weights.stride(0) == 0:
        suspect = 0.0 in weights[0].flatten().tolist()
    else:
        total = (scaled.detach() if scaled.requires_grad else scaled).sum().item()
        suspect = total != total
    if suspect:
        if scaled.requires_grad:  # the mask goes before the product, so that no infinity reaches a gradient either
            scaled = values.masked_fill(gate == 0, 0) * gate
        else:
            scaled.masked_fill_(gate == 0, 0)
    return scaled if scaled.dtype == values.dtype else scaled.to(values.dtype)
