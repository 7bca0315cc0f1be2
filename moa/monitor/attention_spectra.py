"""What rows show that weights do not: the spectra of attention outputs, and how far tasks pull experts together.

"Artificial Entanglement in the Fine-Tuning of Large Language Models" finds that differences between the changes of
weights do not show in attention outputs: theirs are compared with those of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..model.moa_model import MoAModel
from ..model.watched import in_evaluation
from .spectra import effective_rank, gradient_alignment, profile

Batches = Mapping[str, Mapping[str, Tensor]]
ROWS = 256  # of a profile at most; a power of two, so that a cut is at every second place


@dataclass(frozen=True)
class OutputSpectra:
    """The directions that the outputs of one attention use, over the tokens of some rows.

    Args:
        rank: effective rank of the outputs (T, d), with the experts.
        base_rank: the same without them.
        shape: (T', d) of what the profiles are of, the first tokens; T' is a power of two.
        profile: cut -> entropy there, in nats, with the experts.
        base_profile: the same without them.
    """

    rank: float
    base_rank: float
    shape: tuple[int, int]
    profile: Mapping[int, float]
    base_profile: Mapping[int, float]


def attention_spectra(model: MoAModel, batches: Batches) -> dict[str, OutputSpectra]:
    """Return the spectra of the outputs of every attention, with the experts and without, by its name.

    An attention is a module whose class is named so, and which holds no other such one; its output, or the first part
    of it, is (B, S, d) or (T, d). Padding is left out where the batch has an attention_mask (B, S).

    Args:
        model: asked in evaluation mode, and left in the mode that it was in.
        batches: task -> inputs of the model.

    Raises:
        ConfigError: there is no batch.
    """
    with_experts = _outputs(model, batches)
    with model.disable_adapter():
        base = _outputs(model, batches)
    found = {}
    for name, own in with_experts.items():
        n_rows = min(ROWS, 2 ** (len(own).bit_length() - 1))
        found[name] = OutputSpectra(
            effective_rank(own),
            effective_rank(base[name]),
            (n_rows, own.shape[1]),
            profile(own[:n_rows]),
            profile(base[name][:n_rows]),
        )
    return found


def task_alignment(model: MoAModel, batches: Batches) -> tuple[list[str], Tensor]:
    """Return the tasks, and the cosines (N, N) between the gradients of their losses in the experts' parameters.

    Args:
        model: asked in evaluation mode, and left in the mode that it was in.
        batches: task -> inputs of the model, labels included.

    Raises:
        ConfigError: there is no batch, a model without trainable experts or without a loss, or a gradient that is 0.
    """
    _check(batches)
    held = {id(p): p for _, branch in model.branches() for p in branch.bank.parameters() if p.requires_grad}
    if not held:
        raise ConfigError("gradients are of experts that are trained, and this model has none.")
    with in_evaluation(model), torch.enable_grad():
        losses = {task: model(**batch).loss for task, batch in batches.items()}
        without = [task for task, loss in losses.items() if loss is None]
        if without:
            raise ConfigError(f"the model has no loss on the rows of {', '.join(without)}: pass labels.")
        return gradient_alignment(losses, list(held.values()))


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the attentions (B, S, d) -> (B, S, d) of a model by name."""
    named = {name: m for name, m in model.named_modules() if type(m).__name__.endswith("Attention")}
    return {name: m for name, m in named.items() if not any(other.startswith(f"{name}.") for other in named)}


def _outputs(model: MoAModel, batches: Batches) -> dict[str, Tensor]:
    """Return the outputs (T, d) of every attention over the tokens of all batches."""
    _check(batches)
    kept: dict[str, list[Tensor]] = {}
    mask: Tensor | None = None

    def keep(name: str, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out  # (B, S, d) or (T, d)
        seen = mask if mask is not None and mask.shape == first.shape[:-1] else None
        kept.setdefault(name, []).append((first.flatten(0, -2) if seen is None else first[seen]).detach())

    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
        for name, module in attentions(model.base).items()
    ]
    try:
        with in_evaluation(model), torch.no_grad():
            for batch in batches.values():
                mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
                model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in kept.items()}


def _check(batches: Batches) -> None:
    if not batches:
        raise ConfigError("there is no batch: pass the inputs of one task or more.")
