"""Which expert each example of a batch asks for: `adapter_ids`, or `adapter_names` as peft calls it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ContextError, unknown_name
from ..types import Pinned

OURS, PEFT, PEFT_BASE = "adapter_ids", "adapter_names", "__base__"
BATCHES = ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_values", "input_features")


def take_ids(inputs: MutableMapping[str, Any], own: Sequence[str] = ()) -> Any:
    """Return the adapter ids of a call, B of them, under our name or peft's, or None; they leave its keywords.

    Args:
        inputs: the call's keywords, changed in place.
        own: names of the base's own inputs, which stay.

    Raises:
        ContextError: given under both names.
    """
    found = {name: inputs.pop(name) for name in (OURS, PEFT) if name in inputs and name not in own}
    found = {name: ids for name, ids in found.items() if ids is not None}
    if len(found) > 1:
        raise ContextError(f"{PEFT} is peft's word for {OURS}: give one of them.")
    if PEFT in found:
        return [None if name == PEFT_BASE else name for name in found[PEFT]]
    return found.get(OURS)


def chosen_experts(ids: Any, names: Sequence[str], inputs: Mapping[str, Any], args: Sequence[Any] = ()) -> Pinned:
    """Return which expert each example has.

    Args:
        ids: one for each example: names, numbers, or None for the base as it is; or a tensor (B,) of numbers, -1 for
            the base.
        names: of the experts, in order.
        inputs: of the call by name, which say how many examples there are, (B, …).
        args: of the call by place.

    Raises:
        ContextError: an unknown name or number, or not one id for each example.
    """
    n_examples = _examples(inputs, args)
    if isinstance(ids, Tensor):
        if torch.compiler.is_compiling():
            return Pinned(ids, None, has_base=True)
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ContextError(f"{OURS} as a tensor are whole numbers (B,), got {tuple(ids.shape)} of {ids.dtype}.")
        ids = [None if number == -1 else number for number in ids.tolist()]
    if isinstance(ids, (str, int)) or not isinstance(ids, Sequence):
        raise ContextError(
            f"{OURS} are one name for each example, got {ids!r}: give a list, or use pin_expert for all of them."
        )
    if not ids or (n_examples is not None and len(ids) != n_examples):
        raise ContextError(f"{OURS} has {len(ids)} entries and the batch {n_examples} examples: give one for each.")
    return Pinned.of([-1 if name is None else number_of(name, names) for name in ids])


def number_of(expert: Any, names: Sequence[str]) -> int:
    """Return the number of an expert, given by its name or its number; no tensors, so no shapes.

    Raises:
        ContextError: there is none of that name or number.
    """
    if isinstance(expert, str) and expert in names:
        return names.index(expert)
    if isinstance(expert, int) and not isinstance(expert, bool) and 0 <= expert < len(names):
        return expert
    if isinstance(expert, int) and not isinstance(expert, bool):
        raise ContextError(f"expert {expert} does not exist: this model has experts 0 to {len(names) - 1}.")
    raise ContextError(unknown_name("expert", expert, names))


def common_names(recipes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the names that all recipes give to experts of the same number; no tensors, so no shapes.

    A recipe with one expert keeps it for every number where another has several.
    """
    several = [names for names in recipes if len(names) > 1] or recipes
    together = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*several, strict=False))
    return tuple(names[0] for names in together)


def _examples(inputs: Mapping[str, Any], args: Sequence[Any]) -> int | None:
    """Return B, or None where no input says it."""
    named = [inputs.get(name) for name in BATCHES]
    tensors = [value for value in (*named, *args, *inputs.values()) if isinstance(value, Tensor) and value.ndim]
    return tensors[0].shape[0] if tensors else None
