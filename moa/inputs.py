"""What a batch tells the routers: which positions are real, and which are the prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def first_position(tokens: Tensor) -> Tensor:
    """Return a bool mask like tokens (B, S), True at the first position."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    return mask


def prompt_mask(labels: Tensor, attention: Tensor | None) -> Tensor:
    """Return which positions (B, S) come before the answer: real tokens before the first label, at least one.

    Args:
        labels: (B, S), -100 where unlabelled.
        attention: (B, S) bool, True on real tokens; None for all.
    """
    real = torch.ones_like(labels, dtype=torch.bool) if attention is None else attention
    answered = ((labels != -100) & real).cumsum(1) > 0
    start = real & (real.cumsum(1) == 1)
    return (real & ~answered) | start


def prompt_attention(inputs: Tensor, generation_config: Any) -> Tensor:
    """Return the attention mask (B, S) that `generate` would infer from input ids (B, S)."""
    pad = getattr(generation_config, "pad_token_id", None)
    if pad is None or pad == getattr(generation_config, "eos_token_id", None):
        return torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    return (inputs != pad).long()


def as_masks(mask: Any) -> tuple[Tensor, ...]:
    """Return (mask,) as bool where it is a (B, S) mask, () for anything else."""
    return (mask.bool(),) if isinstance(mask, Tensor) and mask.ndim == 2 else ()
