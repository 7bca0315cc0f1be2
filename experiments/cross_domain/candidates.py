"""Rank candidates for a text: an encoder, a pooler, and one score per candidate, the positive against the negatives."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.errors import ConfigError, ShapeError


class CandidateRanker(nn.Module):
    """Scores candidates by a pooled encoding: score_c = τ · v_c · u, u = p + GELU(W p + b) of unit length.

    p is the pooled last hidden state, v_c a candidate's vector of unit length, such as the frozen encoder gives for its
    text. The loss is −log softmax over the candidates, at the positive. With W = 0 it is the encoder's own similarity.

    Args:
        encoder: returns `last_hidden_state` (B, S, d); its `config` says hidden_size.
        pooling: "mean" over real tokens or "cls".
        temperature: τ.

    Raises:
        ConfigError: an unknown pooling.
    Source: X-Cross, arXiv 2504.20859 (pooler with GELU, a score per candidate, softmax over positive and negatives).
    Differs: the pooler adds to what it pools, so that an untrained one ranks as the encoder does; the scores are
        cosines, and the paper's constant per score is left out where it cancels.
    """

    def __init__(
        self, encoder: nn.Module, *, pooling: Literal["mean", "cls"] = "mean", temperature: float = 20.0
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ConfigError(f"pooling must be 'mean' or 'cls', got {pooling!r}.")
        self.encoder, self.pooling, self.temperature = encoder, pooling, temperature
        config: Any = encoder.config
        self.config = config
        width = int(config.hidden_size)
        self.pooler = nn.Linear(width, width)
        nn.init.zeros_(self.pooler.weight)
        nn.init.zeros_(self.pooler.bias)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return u (B, d), unit length, of texts (B, S)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        return F.normalize(pooled + F.gelu(self.pooler(pooled)), dim=-1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, candidates: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return "logits" (B, C), and with labels "loss" ().

        Args:
            input_ids: (B, S).
            attention_mask: (B, S).
            candidates: (B, C, d) vectors v_c of unit length.
            labels: (B,) the place of the positive among the candidates.

        Raises:
            ShapeError: candidates of another batch or width.
        """
        encoded = self.encode(input_ids, attention_mask)
        if candidates.ndim != 3 or candidates.shape[0] != encoded.shape[0] or candidates.shape[2] != encoded.shape[1]:
            raise ShapeError(
                f"candidates must be (B, C, d) = ({encoded.shape[0]}, C, {encoded.shape[1]}), got "
                f"{tuple(candidates.shape)}."
            )
        logits = self.temperature * torch.einsum("bd,bcd->bc", encoded, candidates)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}
