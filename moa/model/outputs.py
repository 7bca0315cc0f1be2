"""What a base returns, whatever it is: a dict, a tuple that begins with a loss, or only the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def tensors_of(outputs: Any) -> list[Tensor]:
    """Return the tensors of any shape among outputs, nested as they are."""
    if hasattr(outputs, "__dict__") and not isinstance(outputs, (Tensor, dict)):
        outputs = (outputs, vars(outputs))  # a record that is not a tree to PyTorch
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss (), or None where there is none."""
    if isinstance(outputs, dict):
        return outputs.get("loss")
    first = outputs[0] if isinstance(outputs, tuple) and outputs else outputs
    return first if isinstance(first, Tensor) and first.ndim == 0 else None


def logits_of(outputs: Any) -> Any:
    """Return what may be the logits, (B, C) or (B, S, C); whether they are is told by whether they give the loss."""
    if isinstance(outputs, dict):
        return outputs.get("logits")
    return outputs[1] if isinstance(outputs, tuple) and len(outputs) > 1 else None


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """Return outputs with another loss () in its place."""
    if isinstance(outputs, dict):
        outputs["loss"] = loss
        return outputs
    return (loss, *outputs[1:]) if isinstance(outputs, tuple) else loss
