"""Every way into a model describes its batch: hooks on the base and on each part of it that takes a batch."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..objective import Trace
from ..rows import ImageRows, seen_by_head
from ..types import Context
from .chosen import chosen_experts, take_ids
from .images import images_by_themselves, placed_images
from .inputs import Batch, as_masks, describe_batch, input_names, outermost
from .scope import ModelScope

SAMPLED = ("pixel_values", "input_values", "input_features")  # one row does not stand for one of their places
TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds", "decoder_inputs_embeds", "hidden_states")
_NO_MASKS: Sequence[Tensor] = ()


class Entry:
    """The hook at the entry of one part: its layers see its own mask, and the outermost entry's tasks and experts.

    A part that gets no mask counts all its rows, but for the one part inside another that has no layers beside it.

    Args:
        scope: of the model.
        names: of the part's inputs, in order.
        kind: "decoder", "encoder-decoder" or "encoder": how labels are read where the batch enters here.
        outside: told of the outputs and the trace of a training forward that begins here, and not at the model.
        shared: several parts lie inside, so that a mask given here may be another's rows.
        stacked: blocks of its own lie in it, beside other parts.
    """

    def __init__(
        self,
        scope: ModelScope,
        names: Sequence[str],
        kind: str,
        outside: Callable[[Any, Trace], None],
        *,
        shared: bool,
        stacked: bool,
    ) -> None:
        self.scope, self.names, self.kind, self.outside = scope, tuple(names), kind, outside
        self.shared, self.stacked = shared, stacked

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Enter the part's context; return the inputs without those that only the mixtures take."""
        around, given = self.scope.current(), len(kwargs)
        begins = around.batch is None
        if begins:
            kwargs = dict(kwargs)
            ids = take_ids(kwargs, self.names)
            pinned = None if ids is None else chosen_experts(ids, self.scope.names, kwargs, args)
            inputs = self._by_name(args, kwargs)
            tasks, labels = inputs.get("task_ids"), inputs.get("labels")
            batch = describe_batch(inputs, kind=self.kind, task_ids=tasks, labels=labels, pinned=pinned)
            around = outermost(around, batch)
            if around.trace is None and module.training and torch.is_grad_enabled() and not is_compiling():
                around.trace = _Own(self)
            if "task_ids" not in self.names:
                kwargs.pop("task_ids", None)
        inputs = self._by_name(args, kwargs)
        context = self._context(around, inputs)
        context.images = self._images(module, inputs, around, begins)
        if context.pinned is not None and context.images is not context.pinned.images:
            context.pinned = dataclasses.replace(context.pinned, images=context.images)
        self.scope.enter(self, context)
        return (args, kwargs) if len(kwargs) < given else None

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args, strict=False)), **kwargs}

    def leave(self, module: nn.Module, args: Any, outputs: Any) -> None:
        """Go back to the context around."""
        trace = self.scope.current().trace
        self.scope.leave(self, outputs)
        if isinstance(trace, _Own) and trace.entry is self and outputs is not None:
            self.outside(outputs, trace)

    def _images(self, module: nn.Module, inputs: dict[str, Any], around: Context, begins: bool) -> ImageRows | None:
        """Return of which example rows of images are, in a part that sees some."""
        if self.shared:  # texts and images
            return placed_images(module, inputs)
        if begins:
            return images_by_themselves(inputs)
        known = around.images
        if known is None or known.tokens is None:  # inside of a part that sees images only
            return known
        texts = any(isinstance(inputs.get(name), Tensor) for name in ("input_ids", "inputs_embeds"))
        return None if texts else dataclasses.replace(known, tokens=None)

    def _context(self, around: Context, inputs: dict[str, Any]) -> Context:
        batch = around.batch
        assert isinstance(batch, Batch)
        given = inputs.get("attention_mask")
        own, masks, looked_at = as_masks(given), _NO_MASKS, _NO_MASKS
        source: tuple[Tensor, Sequence[Tensor]] | None = None
        crossed = inputs.get("encoder_hidden_states")
        if isinstance(
            inputs.get("context"), Tensor
        ):  # a resampler: its own rows are latents, the mask is the context's
            source = (inputs["context"], own)
        elif isinstance(crossed, Tensor):
            there = as_masks(inputs.get("encoder_attention_mask"))
            source = (crossed, there) if there or around.source is None else around.source
            masks, looked_at = own or batch.decoder, batch.routing_of(own, decoder=True)
        elif own:
            masks, looked_at = seen_by_head(own, inputs), batch.routing_of(own)
        elif given is not None and batch.attention:  # in a form of the attention's: the same rows
            masks, looked_at = batch.attention, batch.routing
        elif around.handed_on:
            masks, looked_at, source = around.masks, around.routing_masks, around.source
        if any(inputs.get(name) is not None for name in SAMPLED) and inputs.get("input_ids") is None:
            looked_at = _NO_MASKS  # a mask over samples or frames is not one over the rows that come of them
        if self.shared and not self.stacked:
            masks = looked_at = _NO_MASKS
        context = around.within(masks, looked_at, source)
        context.rows = _rows_of(inputs) or (around.rows if around.handed_on else None)
        context.batch, context.handed_on = batch, not self.shared and not self.stacked
        return context


def _rows_of(inputs: dict[str, Any]) -> tuple[int, int] | None:
    """Return (B, S) of a part's tokens, as its inputs tell."""
    for name in TOKENS:
        tokens = inputs.get(name)
        if isinstance(tokens, Tensor) and tokens.ndim >= 2:
            return tokens.shape[0], tokens.shape[1]
    return None


class _Own(Trace):
    """The trace of a forward that begins at an entry."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry = entry


def open_entries(base: nn.Module, scope: ModelScope, kind: str, outside: Callable[[Any, Trace], None]) -> None:
    """Put hooks on the base and on every part of it that takes a batch (B, …), in the place of those that it has.

    Args:
        base: of the model.
        scope: of the model.
        kind: see `Entry`; of the base.
        outside: see `Entry`.
    """
    close_entries(base)
    parts = {name: module for name, module in base.named_modules() if not name or _takes_a_batch(name, module)}
    for name, module in parts.items():
        inside = [other for other in parts if other != name and other.startswith(f"{name}." if name else "")]
        nearest = [o for o in inside if not any(o.startswith(f"{between}.") for between in inside)]
        stacked = any(isinstance(child, nn.ModuleList) for child in module.children()) and bool(inside)
        entry = Entry(
            scope,
            input_names(module),
            "encoder" if name else kind,
            outside,
            shared=len(nearest) > 1,
            stacked=stacked,
        )
        module.register_forward_pre_hook(entry, with_kwargs=True)
        module.register_forward_hook(entry.leave, always_call=True)


def close_entries(base: nn.Module) -> None:
    """Take the hooks of `open_entries` out of a base, (B, …) -> its outputs, and out of all its parts."""
    for module in base.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), Entry)]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                module._forward_hooks_always_called.pop(number, None)


def _takes_a_batch(name: str, module: nn.Module) -> bool:
    """Whether a module is a model of its own, or a stack of blocks that gets a mask (B, S); a block is neither."""
    if hasattr(module, "get_input_embeddings"):
        return True
    if any(part.isdigit() for part in name.split(".")):
        return False
    stacks = any(isinstance(child, nn.ModuleList) for child in module.children())
    return stacks and "attention_mask" in inspect.signature(module.forward).parameters
