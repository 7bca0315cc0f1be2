"""What a batch tells the routers: which positions are real, and which are the prompt."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Context, Pinned


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the outermost entry of a forward was told.

    Args:
        task_ids: (B,) or None.
        attention: (B, S) masks, True on real tokens.
        routing: (B, S) masks of what pooled routers may look at.
        decoder: (B, S') masks of the decoder of an encoder-decoder.
        decoder_routing: (B, S') masks of what pooled routers may look at there.
        generating: the masks are those of a prompt, which grows and whose rows may be repeated.
        pinned: the expert of each example; None where routers decide.
    """

    task_ids: Tensor | None = None
    attention: tuple[Tensor, ...] = ()
    routing: tuple[Tensor, ...] = ()
    decoder: tuple[Tensor, ...] = ()
    decoder_routing: tuple[Tensor, ...] = ()
    generating: bool = False
    pinned: Pinned | None = None

    def routing_of(self, own: tuple[Tensor, ...], *, decoder: bool = False) -> tuple[Tensor, ...]:
        """Return the masks of what pooled routers may look at in a part whose own masks (B, S) are these."""
        given = self.decoder_routing if decoder else self.routing
        if not given or not own:
            return given or own
        same_rows = self.generating or decoder or (bool(self.attention) and own[0].shape == self.attention[0].shape)
        return given if same_rows else own


def describe_batch(
    inputs: Mapping[str, Any],
    *,
    kind: str,
    task_ids: Tensor | None = None,
    routing_mask: Tensor | None = None,
    labels: Any = None,
    generating: bool = False,
    pinned: Pinned | None = None,
) -> Batch:
    """Return what a batch holds.

    Args:
        inputs: the model's inputs; attention_mask (B, S), decoder_attention_mask and decoder_input_ids are read.
        kind: "decoder", "encoder-decoder" or "encoder".
        task_ids: (B,).
        routing_mask: (B, S) what pooled routers may look at; None finds the prompt.
        labels: (B, S) labels tell where a prompt ends.
        generating: the inputs are a prompt.
        pinned: the expert of each example.
    """
    attention = as_masks(inputs.get("attention_mask"))
    token_labels = labels if isinstance(labels, Tensor) and labels.ndim == 2 else None
    routing, decoder_routing = attention, as_masks(routing_mask)
    decoder: tuple[Tensor, ...] = ()
    if kind == "encoder-decoder":
        tokens = inputs.get("decoder_input_ids", token_labels)
        decoder = as_masks(inputs.get("decoder_attention_mask"))
        if not decoder and token_labels is not None:
            decoder = (token_labels != -100,)
        if tokens is not None and not decoder_routing:  # only the first position: the rest is the answer
            decoder_routing = (first_position(tokens),)
    elif routing_mask is not None:
        routing = as_masks(routing_mask)
    elif kind == "decoder" and token_labels is not None:
        routing = (prompt_mask(token_labels, attention[0] if attention else None),)
    return Batch(task_ids, attention, routing, decoder, decoder_routing, generating, pinned)


def outermost(around: Context, batch: Batch) -> Context:
    """Return the context of a forward that begins, given that outside of it; its masks (B, S) are the batch's."""
    context = around.within(batch.attention, batch.routing, None)
    context.task_ids = around.task_ids if batch.task_ids is None else batch.task_ids
    context.ranks = around.ranks
    context.pinned = around.pinned if batch.pinned is None else batch.pinned
    context.batch, context.handed_on, context.preview = batch, True, ()
    return context


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
