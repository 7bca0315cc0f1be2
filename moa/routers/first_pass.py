"""Routing decided before the layers run, from a first pass of the frozen base. Buehler and Buehler 2024 (X-LoRA)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError, ContextError
from ..kernels import exact_linear
from ..types import Context, Routing
from . import select
from .router import Router, pool


class ExactLinear(nn.Linear):
    """A linear layer whose output is fp32, or fp64 for such an input, whatever the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b, (*rows, o), of x (*rows, i)."""
        out = exact_linear(input, self.weight)  # (*rows, o)
        return out + self.bias.to(out.dtype)


class Classifier(nn.Module):
    """Logits of experts from a hidden state: linear layers of widths d, width, …, E with ReLU between.

    | parameter | shape | start |
    |---|---|---|
    | layers.0.weight … | (E, d), or (width, d), …, (E, width) | as nn.Linear |

    Args:
        d_hidden: d.
        n_experts: E.
        depth: linear layers.
        width: of the inner ones.
        dropout: between them, in training.
    """

    def __init__(self, d_hidden: int, n_experts: int, depth: int = 1, width: int = 2048, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        sizes = [d_hidden, *[width] * (depth - 1), n_experts]
        self.layers = nn.ModuleList(ExactLinear(a, b) for a, b in itertools.pairwise(sizes))

    @property
    def per_expert(self) -> Mapping[str, int]:
        """The last layer's tensors, (E, width) and (E,), by name, and their axis of experts."""
        last = len(self.layers) - 1
        return {f"layers.{last}.weight": 0, f"layers.{last}.bias": 0}

    def reset_parameters(self) -> None:
        """Draw every layer's weight, (E, d) for one layer, and bias anew."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits (*rows, E), fp32, of hidden (*rows, d)."""
        for number, layer in enumerate(self.layers):
            if number:
                hidden = F.dropout(hidden.relu(), self.dropout, self.training)
            hidden = layer(hidden)  # (*rows, width), (*rows, E) at the last
        return hidden


class PreviewRouter(Router):
    """Scores experts from the last hidden state h of the frozen base on the same tokens, not from the layer's own x.

    logits = classifier(h);  w = softmax(logits / T) over all experts, or its k largest entries as they are

    Several routers may have one classifier: one set of weights for the whole model.

    Args:
        d_in: i, unused.
        n_experts: E.
        k: K; with K = E every expert acts.
        classifier: maps h (*rows, d) to logits (*rows, E), see `Classifier`.
        temperature: T.
        score: "softmax", or "raw" for the logits themselves.
        renormalize: a second softmax over the kept weights.

    Raises:
        ConfigError: a temperature or score that cannot be.
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
        classifier: Classifier,
        temperature: float = 1.0,
        score: Literal["softmax", "raw"] = "softmax",
        renormalize: bool = False,
    ) -> None:
        super().__init__(d_in, n_experts, k)
        check_scores(temperature, score)
        self.temperature, self.score, self.renormalize = temperature, score, renormalize
        self.classifier = classifier

    @property
    def per_expert(self) -> Mapping[str, int]:  # type: ignore[override]
        """The classifier's tensors of experts, where it is this router's own: (E, width) and (E,)."""
        return {f"classifier.{name}": axis for name, axis in self.classifier.per_expert.items()}

    def reset_parameters(self) -> None:
        """Draw the classifier anew, (E, d) for one layer."""
        self.classifier.reset_parameters()

    def forward(self, x: Tensor, context: Context) -> Routing:
        """Return the routing for the rows of x (*rows, i).

        Raises:
            ContextError: there was no first pass, or it saw other rows.
        """
        if not context.preview:
            raise ContextError(
                "this router looks at a first pass of the frozen base, and there was none: call the MoAModel, or its "
                "base inside it, not one of its layers."
            )
        hidden = self._rows(context.preview, x, context)  # (*rows, d)
        logits = self.classifier(hidden) / self.temperature  # (*rows, E)
        scores = logits.softmax(-1)
        values = scores if self.score == "softmax" else logits
        if self.k == self.n_experts and not self.renormalize:
            return Routing(values, None, self.n_experts, logits, scores)
        kept, indices = values.topk(self.k, -1)  # (*rows, K)
        if self.renormalize:
            kept, indices = select.softmax_top_k(values, self.k)
        return Routing(kept, indices, self.n_experts, logits, scores)

    def constant(self, task: int | None = None) -> Routing | None:
        """Return the routing of rows () where there is one expert and its weight a softmax; else None."""
        if self.n_experts > 1 or not (self.score == "softmax" or self.renormalize):
            return None
        return self.every_expert(next(self.classifier.parameters()))

    @staticmethod
    def _rows(previews: Sequence[Tensor], x: Tensor, context: Context) -> Tensor:
        """Return hidden states (B, S, d) for the rows of x (*rows, i): as they are, flattened, or one per example."""
        rows, hidden = x.shape[:-1], previews[0]
        for seen in previews:
            if seen.shape[:-1] == rows:
                return seen
        for seen in previews:
            if seen.shape[:-1].numel() == rows.numel():
                return seen.reshape(*rows, seen.shape[-1])
        if rows == hidden.shape[:1]:
            return pool(hidden, context.routing_masks_for(x)).squeeze(1)
        raise ContextError(
            f"the first pass saw rows {tuple(hidden.shape[:-1])}, this layer has {tuple(rows)}: choose targets that "
            "see one row per token."
        )


def check_scores(temperature: float, score: str) -> None:
    """Check what becomes of a classifier's logits.

    Raises:
        ConfigError: a temperature or score that cannot be.
    """
    if temperature <= 0 or score not in ("softmax", "raw"):
        raise ConfigError(
            f"temperature must be positive and score 'softmax' or 'raw', got {temperature} and {score!r}."
        )
