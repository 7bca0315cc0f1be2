"""A linear gate as the kernels see it: how a row's logits become the experts that act on it, and the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..compat import softmax_backward
from ..types import Routing


def softmax_scores(routing: Routing) -> Tensor:
    """Return the softmax of the logits over the experts, (*rows, E)."""
    assert routing.logits is not None
    return routing.logits.softmax(-1)


def sigmoid_scores(routing: Routing) -> Tensor:
    """Return the sigmoid of the logits, (*rows, E)."""
    assert routing.logits is not None
    return routing.logits.sigmoid()


SCORES: dict[str, Callable[[Routing], Tensor]] = {"softmax": softmax_scores, "sigmoid": sigmoid_scores}


class Gate(NamedTuple):
    """What a linear router decides by: logits x Wᵀ, their scores, the k that are chosen, the weights of those.

    Args:
        weight: (E, i) W.
        k: experts per row; with E of them and no bias there is no choice, and no index.
        score: of the logits over the experts.
        renormalize: the weights of a row sum to one.
        bias: (E,) added to the scores for the choice only, or None.
        jitter: the logits are those of x · U(1 − jitter, 1 + jitter), drawn anew for every value.
    """

    weight: Tensor
    k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    bias: Tensor | None = None
    jitter: float = 0.0

    @property
    def is_dense(self) -> bool:
        """Whether every expert acts on every row."""
        return self.k == self.weight.shape[0] and self.bias is None

    @property
    def is_softmax_top_k(self) -> bool:
        """Whether the weights are the softmax over the k largest logits: then no other logit is needed for them."""
        return self.score == "softmax" and self.renormalize and self.bias is None and self.k < self.weight.shape[0]

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the weights (*rows, K), indices, None where dense, and scores (*rows, E) of logits (*rows, E).

        Scores are None where the weights do without, or are them.
        """
        if self.is_softmax_top_k:
            kept, chosen = logits.topk(self.k, -1)
            return kept.softmax(-1), chosen, None
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        if self.is_dense:
            return (scores / _total(scores), None, scores) if self.normalises else (scores, None, None)
        if self.bias is None:
            weights, chosen = scores.topk(self.k, -1)
        else:
            chosen = (scores + self.bias).topk(self.k, -1).indices
            weights = scores.gather(-1, chosen)
        return weights / _total(weights) if self.normalises else weights, chosen, scores

    @property
    def normalises(self) -> bool:
        """Whether weights are scores over their sum; the sum of a dense softmax is 1 as it is."""
        return self.renormalize and not (self.is_dense and self.score == "softmax")

    def to_logits(
        self,
        grad_logits: Tensor | None,
        grad_weights: Tensor | None,
        weights: Tensor,
        indices: Tensor | None,
        scores: Tensor | None,
    ) -> Tensor | None:
        """Return the whole gradient of the logits (T, E): their own, and through `decide` that of the weights."""
        if grad_weights is None:
            return grad_logits
        if self.is_softmax_top_k:
            assert indices is not None
            own = weights.new_zeros(len(weights), len(self.weight)) if grad_logits is None else grad_logits
            return own.scatter_add(1, indices, softmax_backward(grad_weights, weights))
        scores = weights if scores is None else scores
        grad = self._to_scores(grad_weights, weights, indices, scores)
        through = softmax_backward(grad, scores) if self.score == "softmax" else grad * scores * (1 - scores)
        return through if grad_logits is None else grad_logits + through

    def _to_scores(self, grad: Tensor, weights: Tensor, indices: Tensor | None, scores: Tensor) -> Tensor:
        """Return the gradient of the scores (T, E), from that of the weights (T, K)."""
        if self.normalises:
            chosen = scores if indices is None else scores.gather(-1, indices)
            grad = (grad - (grad * weights).sum(-1, keepdim=True)) / _total(chosen)
        return grad if indices is None else torch.zeros_like(scores).scatter_add(1, indices, grad)


def _total(scores: Tensor) -> Tensor:
    """Return the sum of a row's scores (T, K), (T, 1), above 0."""
    return scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
