"""How scores become a choice of experts and their weights: pure functions, all fp32, all per row."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int, bias: Tensor | None = None, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Return the k largest scores per row as weights (*rows, k) and their indices (*rows, k).

    Args:
        scores: (*rows, E), not negative.
        k: experts per row.
        bias: (E,) added for the choice only, never to the weights (DeepSeek-V3, arXiv 2412.19437, eq. 16).
        renormalize: make the weights of a row sum to one (Mixtral); False keeps the scores (Switch).
    """
    if bias is None:
        weights, indices = scores.topk(k, -1)
    else:
        indices = (scores.detach() + bias).topk(k, -1).indices  # (*rows, k)
        weights = scores.gather(-1, indices)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return weights, indices


def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the softmax over the k largest logits, weights (*rows, k) and indices (*rows, k).

    The same function as `top_k(softmax(logits), k)`, by fewer operations and with half the backward.

    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 3 and 5.
    """
    kept, indices = logits.topk(k, -1)
    return kept.softmax(-1), indices


def selection_probability(clean: Tensor, noisy: Tensor, std: Tensor, k: int) -> Tensor:
    """Return the probability (*rows, E) that each expert stays in the top k when its own noise is drawn again.

    Φ((clean_e − threshold_e) / std_e), the threshold being the k-th largest noisy logit of the other experts.

    Args:
        clean: (*rows, E) logits without noise.
        noisy: (*rows, E) logits with the noise that was drawn.
        std: (*rows, E) standard deviation of the noise.
        k: experts per row; with k = E the probability is 1.
    Source: Shazeer et al. 2017, arXiv 1701.06538, eq. 8-9.
    """
    if k == clean.shape[-1]:
        return torch.ones_like(clean)
    top = noisy.topk(k + 1, -1).values  # (*rows, k + 1)
    inside = noisy > top[..., k : k + 1]  # (*rows, E); of the others, the k-th largest is then top[k]
    threshold = torch.where(inside, top[..., k : k + 1], top[..., k - 1 : k])
    return torch.special.ndtr((clean - threshold) / std)
