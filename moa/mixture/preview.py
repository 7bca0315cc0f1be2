"""The first pass: what only the frozen base makes of a batch, for routers that decide before the layers run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ContextError
from ..rows import seen_by_head
from ..types import Scope
from .caches import JointCache, is_cache, with_follower
from .hooks import check_hooks_run


class Preview:
    """Runs the base without experts on a batch first, and leaves its last hidden state (B, S, d) in a context.

    The pass has no gradient, no dropout and no head; in training, whoever runs it runs alone (`switches_modes`). While
    decoding it has a key-value cache of its own, which follows the model's through beam search (`moa.mixture.caches`):
    each pass sees only the new tokens.

    Args:
        base: a model of one stack whose body returns `last_hidden_state`.
        scope: of its mixtures.

    Raises:
        ConfigError: an encoder-decoder, or a model whose width is not known.
    """

    def __init__(self, base: nn.Module, scope: Scope) -> None:
        hidden_width(base)
        self.base, self.scope = base, scope
        self.body: Any = _body(base)
        # read once: compiled code has no signatures
        self._places = _parameters(base, inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._known = _parameters(self.body, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

    @contextlib.contextmanager
    def before_each_forward(self) -> Iterator[None]:
        """Run the first pass before every forward of the base inside the block, as generation needs it.

        Raises:
            ConfigError: the base is compiled, so that the first pass would be left out.
        """
        check_hooks_run(self.base, [self.base])
        hook = self.base.register_forward_pre_hook(lambda _, args, kwargs: self.run(args, kwargs), with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Leave the last hidden state (B, S, d) of these inputs of the base in the context.

        Args:
            args: positional inputs.
            kwargs: the others; labels and what only the head needs are left out.

        Returns:
            The inputs for the base itself: the same, but for a key-value cache that the first pass's own follows.

        Raises:
            ContextError: a key-value cache that began without a first pass, or that the first pass has not followed.
        """
        context = self.scope.current()
        if not context.enabled or context.pinned is not None:
            return args, kwargs
        args, kwargs = (_with_followers(args), _with_followers(kwargs))
        inputs = {**dict(zip(self._places, args, strict=False)), **kwargs}
        context.preview = seen_by_head((self._hidden(inputs),), inputs)
        return args, kwargs

    @property
    def switches_modes(self) -> bool:
        """Whether a pass sets modules to evaluation while it runs, as all threads see: it has to run alone then."""
        return any(module.training for module in self.body.modules())

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        body, known = self.body, self._known
        inputs = {name: value for name, value in inputs.items() if name in known and name != "labels"}
        cache = inputs.get("past_key_values")
        if "use_cache" in known:
            inputs["use_cache"] = cache is not None
        if cache is not None:
            inputs["past_key_values"] = cache.follower
        training = [m for m in body.modules() if m.training]
        context = self.scope.current()
        context.enabled = False
        try:
            for m in training:
                m.training = False
            with torch.no_grad():
                hidden = body(**inputs).last_hidden_state
        finally:
            context.enabled = True
            for m in training:
                m.training = True
        assert isinstance(hidden, Tensor)
        return hidden


def _body(base: nn.Module) -> nn.Module:
    """Return what makes the last hidden state (B, S, d): a wrapper that only hands inputs on has no names for them."""
    body = getattr(base, "base_model", base)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    while not _parameters(body, *named) and len(parts := list(body.children())) == 1:
        (body,) = parts
    return body


def _parameters(module: nn.Module, *kinds: Any) -> tuple[str, ...]:
    """Return the names of the inputs (B, …) of a module's forward that are of some kinds, in order."""
    return tuple(p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds)


def _with_followers(inputs: Any) -> Any:
    """Return inputs by place or by name with a cache that the first pass follows in the place of one it does not."""
    if isinstance(inputs, dict):
        return {name: _followed(value) if is_cache(value) else value for name, value in inputs.items()}
    return tuple(_followed(value) if is_cache(value) else value for value in inputs)


def _followed(cache: Any) -> Any:
    if not isinstance(cache, JointCache) or cache.follower is None:
        if int(cache.get_seq_length()) > 0:
            raise ContextError(
                "the first pass has not seen what this cache holds: routers that look at one need the whole prompt. "
                "Start from an empty cache, as generate does, and go on with the past_key_values of the outputs."
            )
        return with_follower(cache)
    pair: tuple[Any, Any] = cache, cache.follower
    if not pair[0].is_compileable:  # the length of a static cache lies on the device
        here, there = (one.get_seq_length() for one in pair)
        if here != there:
            raise ContextError(
                f"this cache holds {here} positions and its first pass {there}: a forward between them ran without "
                "the experts, or only one of the two was cropped. Start from an empty cache."
            )
    return cache


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
