"""Which folders of other libraries `moa.load` reads, and what puts each into a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import CheckpointError
from .foreign import Foreign
from .mixlora_folder import adopt_mixlora
from .xlora_folder import adopt_xlora

ADOPTERS: dict[str, Callable[[Any, Foreign], None]] = {"MIXLORA": adopt_mixlora, "XLORA": adopt_xlora}  # by peft_type


def adopt(model: Any, found: Foreign) -> None:
    """Put a folder's mixture into a model that has none, in its place (*rows, i) -> (*rows, o).

    Raises:
        CheckpointError: neither MixLoRA nor X-LoRA, an option with no counterpart (named), missing or unexpected
            tensors, or a base that it was not made for.
    """
    if found.kind not in ADOPTERS:
        advice = "moa.build(base, ..., experts=[folder, ...]) makes LoRA adapters the experts of a mixture."
        raise CheckpointError(
            f"{found.path} is a {found.kind} adapter; moa.load reads its own checkpoints, "
            f"{' and '.join(ADOPTERS)}. {advice if found.kind == 'LORA' else ''}".rstrip()
        )
    ADOPTERS[found.kind](model, found)
