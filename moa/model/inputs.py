"""What a batch tells the routers: which positions are real, and which are the prompt."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Context


def describe_batch(
    context: Context,
    encoder: Context,
    inputs: dict[str, Any],
    *,
    kind: str,
    task_ids: Tensor | None = None,
    routing_mask: Tensor | None = None,
    labels: Any = None,
) -> None:
    """Tell the contexts of a model what a batch holds.

    Args:
        context: of the decoder, or of the whole model where it has one part.
        encoder: of the encoder half.
        inputs: the model's inputs; attention_mask (B, S), decoder_attention_mask and decoder_input_ids are read.
        kind: "decoder", "encoder-decoder" or "encoder".
        task_ids: (B,); None forgets those of the batch before.
        routing_mask: (B, S) what pooled routers may look at; None finds the prompt.
        labels: (B, S) labels tell where a prompt ends.
    """
    attention = as_masks(inputs.get("attention_mask"))
    context.decisions, encoder.decisions = {}, {}
    context.task_ids = encoder.task_ids = task_ids
    encoder.masks = encoder.routing_masks = attention
    context.masks = context.routing_masks = attention
    token_labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
    if kind == "encoder-decoder":
        decoder = inputs.get("decoder_input_ids", token_labels)
        own = as_masks(inputs.get("decoder_attention_mask"))
        if not own and token_labels is not None:
            own = (token_labels != -100,)
        context.masks = (*own, *attention)
        if decoder is not None:  # the decoder may look at its first position alone: the rest is its answer
            context.routing_masks = (first_position(decoder), *attention)
    elif kind == "decoder" and token_labels is not None:
        context.routing_masks = (prompt_mask(token_labels, attention[0] if attention else None),)
    if routing_mask is not None:
        context.routing_masks = as_masks(routing_mask)


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


def input_names(base: nn.Module) -> tuple[str, ...]:
    """Return the names of a base's inputs (B, …) in order, () where they cannot all be passed by name."""
    parameters = inspect.signature(base.forward).parameters.values()
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    return () if any(p.kind in by_position for p in parameters) else tuple(p.name for p in parameters)
