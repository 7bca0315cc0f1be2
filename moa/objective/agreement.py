"""How far the outputs of a training step's forwards are from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ContextError
from ..types import Context
from .exchange import over_processes


def disagreement(logits: Sequence[Any], context: Context) -> Tensor:
    """Return the mean over rows of (KL(p ‖ q) + KL(q ‖ p)) / 2 in nats, p the first's softmax, q each other's, ().

    Under data parallelism the rows are those of all processes.

    Args:
        logits: M outputs, (B, C) or (B, S, C); −∞ where a head lacks an output.
        context: of the batch; its masks say which rows count.

    Raises:
        ContextError: outputs that are not logits of one shape.
    """
    if not all(isinstance(one, Tensor) and one.ndim > 1 and one.shape == logits[0].shape for one in logits):
        raise ContextError("a consistency loss compares logits, and these outputs have none: set consistency=0.")
    mask = context.mask_for(logits[0])
    log_p, *others = [_log_probabilities(one) for one in logits]
    sums = []
    for log_q in others:
        rows = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2  # (*rows,)
        sums.append((rows if mask is None else torch.where(mask, rows, 0)).sum())
    count = sums[0].new_tensor(log_p[..., 0].numel()) if mask is None else mask.sum().to(sums[0].dtype)
    (totals,) = over_processes([torch.stack([*sums, count])])  # (M,)
    return (totals[:-1] / totals[-1].clamp(min=1)).mean()


def _log_probabilities(logits: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.where(torch.isfinite(wide), F.log_softmax(wide, -1), 0)  # equal in all where it lacks an output
