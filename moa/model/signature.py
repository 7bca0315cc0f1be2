"""The signature of a model's forward: what its base takes, and what routing adds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

ADDED = ("task_ids", "adapter_ids", "routing_mask", "num_items_in_batch")


def joint_signature(base: Callable[..., Any], own: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a base's forward, (B, …) inputs, with the keywords that our own adds.

    Args:
        base: the forward of the base's class; where it takes labels, they stay a named input.
        own: the forward of `MoAModel`, whose keywords are added and whose **kwargs close the list.
    """
    mine, theirs = inspect.signature(own).parameters, inspect.signature(base).parameters
    kinds = inspect.Parameter
    kept = [p for name, p in theirs.items() if name not in mine or name == "self"]
    named = [p for p in kept if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD, kinds.VAR_POSITIONAL)]
    rest = [p for p in kept if p.kind is kinds.KEYWORD_ONLY]
    extra = [mine[name] for name in (("labels", *ADDED) if "labels" in theirs else ADDED)]
    return inspect.Signature([*named, *rest, *extra, mine["kwargs"]])
