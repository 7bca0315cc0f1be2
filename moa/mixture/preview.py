"""The first pass: what the frozen base alone makes of a batch, for routers that decide before the layers run."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ContextError
from ..types import Context

# what a cache does to its rows or positions besides growing; the first pass's own cache must do the same
CACHE_METHODS = ("reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices", "reset")


class Preview:
    """Runs the base without experts on a batch first, and leaves its last hidden state (B, S, d) in a context.

    The pass has no gradient, no dropout and no head. While decoding it has a key-value cache of its own, which follows
    the model's through beam search: each pass sees the new tokens alone.

    Args:
        base: a model of one stack whose body returns `last_hidden_state`.
        context: of its mixtures.

    Raises:
        ConfigError: an encoder-decoder, or a model whose width is not known.
    """

    def __init__(self, base: nn.Module, context: Context) -> None:
        hidden_width(base)
        self.base, self.context = base, context
        self._running = False
        self._caches: tuple[Any, Any] | None = None

    @contextlib.contextmanager
    def before_each_forward(self) -> Iterator[None]:
        """Run the first pass before every forward of the base inside the block, as generation needs it."""
        hook = self.base.register_forward_pre_hook(lambda _, args, kwargs: self.run(args, kwargs), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
            self._caches = None

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Leave the last hidden state (B, S, d) of these inputs of the base in the context.

        Args:
            args: positional inputs.
            kwargs: the others; labels and what the head alone needs are left out.

        Raises:
            ContextError: a key-value cache that began without a first pass.
        """
        if self._running or not self.context.enabled or self.context.pinned is not None:
            return
        bound = inspect.signature(self.base.forward).bind_partial(*args, **kwargs)
        inputs = {**bound.arguments}
        for extra in [p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD]:
            inputs.update(inputs.pop(extra, {}))
        self.context.preview = self._hidden(inputs)

    @torch.no_grad()
    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        body: Any = getattr(self.base, "base_model", self.base)
        names = inspect.signature(body.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in names and name != "labels"}
        cache = inputs.get("past_key_values")
        if "use_cache" in names:
            inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs["past_key_values"] = self._own_cache(cache)
        training = [m for m in body.modules() if m.training]
        self._running, self.context.enabled = True, False
        try:
            for m in training:
                m.training = False
            hidden = body(**inputs).last_hidden_state
        finally:
            self._running, self.context.enabled = False, True
            for m in training:
                m.training = True
        assert isinstance(hidden, Tensor)
        return hidden

    def _own_cache(self, cache: Any) -> Any:
        if self._caches is not None and self._caches[0] is cache:
            return self._caches[1]
        if int(cache.get_seq_length()) > 0:
            raise ContextError(
                "the first pass has not seen what this cache holds: routers that look at one need the whole prompt. "
                "Start from an empty cache, as generate does."
            )
        own = copy.deepcopy(cache)  # still empty: another of its kind
        for name in CACHE_METHODS:
            if hasattr(cache, name):
                setattr(cache, name, _both(getattr(cache, name), getattr(own, name)))
        self._caches = (cache, own)
        return own


def _both(one: Any, other: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        other(*args, **kwargs)
        return one(*args, **kwargs)

    return call


def hidden_width(base: nn.Module) -> int:
    """Return d, the width of the last hidden state (B, S, d) of a model's body.

    Raises:
        ConfigError: an encoder-decoder, or a model that does not say it.
    """
    config = getattr(base, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ConfigError(f"a first pass needs a transformers model with a hidden_size, not a {type(base).__name__}.")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"a first pass needs a model of one stack, and {type(base).__name__} has two.")
    return width
