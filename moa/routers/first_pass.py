"""Routing decided before the layers run, from a first pass of the frozen base. Buehler and Buehler 2024 (X-LoRA)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ContextError
from ..kernels import exact_linear
from ..types import Context, Routing
from . import select
from .router import Router, pool


class PreviewRouter(Router):
    """Scores experts from the last hidden state h of the frozen base on the same tokens, not from the layer's own x.

    logits = classifier(h);  w = softmax(logits / T) over all experts, or its k largest entries as they are

    | parameter | shape | start |
    |---|---|---|
    | layers.0.weight … | (E, d), or a stack of widths d, width, …, E with ReLU between | as nn.Linear |

    Several routers may `share` one's classifier: one set of weights for the whole model.

    Args:
        d_in: i, unused.
        n_experts: E.
        k: K; with K = E every expert acts.
        d_hidden: d.
        depth: linear layers of the classifier.
        width: of its inner layers.
        dropout: between them, in training.
        temperature: T.
        score: "softmax", or "raw" for the logits themselves.
        renormalize: a second softmax over the kept weights.

    Raises:
        ConfigError: a depth, temperature or score that cannot be.
    Source: arXiv 2402.07148, §2; peft's X-LoRA.
    """

    needs_preview = True
    rowwise = False

    def __init__(
        self,
        d_in: int,
        n_experts: int,
        k: int,
        *,
        d_hidden: int,
        depth: int = 1,
        width: int = 2048,
        dropout: float = 0.2,
        temperature: float = 1.0,
        score: Literal["softmax", "raw"] = "softmax",
        renormalize: bool = False,
    ) -> None:
        super().__init__(d_in, n_experts, k)
        check_classifier(depth, temperature, score)
        self.temperature, self.score, self.renormalize, self.dropout = temperature, score, renormalize, dropout
        sizes = [d_hidden, *[width] * (depth - 1), n_experts]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    @property
    def per_expert(self) -> Mapping[str, int]:  # type: ignore[override]
        """The last layer's tensors, (E, width) and (E,)."""
        last = len(self.layers) - 1
        return {f"layers.{last}.weight": 0, f"layers.{last}.bias": 0}

    def reset_parameters(self) -> None:
        """Draw every layer's weight, (E, d) for one layer, and bias anew."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()

    def share(self, other: PreviewRouter) -> None:
        """Have another router's classifier, (E, d), from now on: tied weights, which a checkpoint holds once."""
        self.layers = other.layers

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing for the rows of x (*rows, i).

        Raises:
            ContextError: there was no first pass, or it saw other rows.
        """
        if context.preview is None:
            raise ContextError(
                "this router looks at a first pass of the frozen base, and there was none: call the MoAModel, or its "
                "base inside it, not one of its layers."
            )
        hidden = self._rows(context.preview, x, context)  # (*rows, d)
        logits = self.classify(hidden) / self.temperature  # (*rows, E)
        scores = logits.softmax(-1)
        values = scores if self.score == "softmax" else logits
        if self.k == self.n_experts and not self.renormalize:
            return Routing(values, None, self.n_experts, logits, scores)
        kept, indices = values.topk(self.k, -1)  # (*rows, K)
        if self.renormalize:
            kept, indices = select.softmax_top_k(values, self.k)
        return Routing(kept, indices, self.n_experts, logits, scores)

    @staticmethod
    def _rows(hidden: Tensor, x: Tensor, context: Context) -> Tensor:
        """Return hidden (B, S, d) for the rows of x (*rows, i): as it is, flattened, or pooled to one per example."""
        rows = x.shape[:-1]
        if hidden.shape[:-1] == rows:
            return hidden
        if hidden.shape[:-1].numel() == rows.numel():
            return hidden.reshape(*rows, hidden.shape[-1])
        if rows == hidden.shape[:1]:
            return pool(hidden, context.routing_masks_for(x)).squeeze(1)
        raise ContextError(
            f"the first pass saw rows {tuple(hidden.shape[:-1])}, this layer has {tuple(rows)}: choose targets that "
            "see one row per token."
        )

    def classify(self, hidden: Tensor) -> Tensor:
        """Return logits (*rows, E), fp32, of hidden (*rows, d)."""
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            if number:
                hidden = F.dropout(hidden.relu(), self.dropout, self.training)
            hidden = exact_linear(hidden, layer.weight)  # (*rows, width), (*rows, E) at the last
            hidden = hidden + layer.bias.to(hidden.dtype)
        return hidden


def check_classifier(depth: int, temperature: float, score: str) -> None:
    """Check how many layers a classifier has, and what becomes of its logits.

    Raises:
        ConfigError: a depth, temperature or score that cannot be.
    """
    if depth < 1 or temperature <= 0 or score not in ("softmax", "raw"):
        raise ConfigError(
            f"depth must be at least 1, temperature positive and score 'softmax' or 'raw', got {depth}, "
            f"{temperature} and {score!r}."
        )
