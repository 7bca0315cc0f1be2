"""Losses that are computed outside of the model: what its routers ask for is carried into them, or is warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd import Function

from ..errors import ContextError, LostLossWarning
from ..objective import Trace
from .outputs import tensors_of

HOW = "compute yours inside model.routed_loss(lambda: …), e.g. in a Trainer's compute_loss, or build without them."
SAMPLED = (
    "a sampling recipe, or a consistency loss, learns from several forwards, and this loss was computed from one: pass "
    "labels, or compute your loss inside model.routed_loss(lambda: ...), which has no consistency loss."
)
LIKELIHOODS, LABELLED = "log_probs", "label_mask"  # what outputs call the log-likelihoods of labels, as TRL's do


def asked_of(traces: Iterable[Trace]) -> list[str]:
    """Return the names of the losses that the routers of some traces, each of rows (*rows, E), ask for."""
    weights: list[Any] = [record.router.loss_weights for trace in traces for record in trace]
    return sorted({name for own in weights for name in own})


def warn_of_lost(asked: list[str]) -> None:
    """Say that a loss () goes without the losses that its routers ask for."""
    warnings.warn(
        f"this loss was computed outside of the model, so the routers' own losses ({', '.join(asked)}) are not in it: "
        f"{HOW}",
        LostLossWarning,
        stacklevel=3,
    )


def hook_all(outputs: Any, learned_from: Callable[[], None]) -> None:
    """Call a function in each backward from outputs, tensors of any shape, nested."""
    for tensor in tensors_of(outputs):
        if tensor.requires_grad:
            tensor.register_hook(lambda _: learned_from())


def carried(likelihoods: Tensor, labelled: Tensor, extra: Tensor, refused: Callable[[], None]) -> Tensor:
    """Return log-likelihoods of labels as they are, (B, S), with an extra loss in the backward of a loss made of them.

    A loss Σ_t w · (−log p_t) weighs every label alike; the sum of the weights is what it gives to the mean of this
    batch, whatever accumulation, processes and loss scaling do to it, and the extra loss gets the same. Where the
    weights are not alike, as in DPO or GRPO, nothing says what the batch counts for: the extra loss is left out.

    Args:
        likelihoods: (B, S).
        labelled: (B, S) bool, where there is a label.
        extra: ().
        refused: called where the weights are not alike.
    """
    out: Tensor = _Carried.apply(likelihoods, labelled, extra, refused)
    return out


class _Carried(Function):
    """The identity on log-likelihoods (B, S), whose backward reads off what their loss weighs."""

    @staticmethod
    def forward(ctx: Any, likelihoods: Tensor, labelled: Tensor, extra: Tensor, refused: Callable[[], None]) -> Tensor:
        ctx.save_for_backward(labelled)
        ctx.refused, ctx.dtype = refused, extra.dtype
        return likelihoods.view_as(likelihoods)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (labelled,) = ctx.saved_tensors
        weights = -grad[labelled]  # (labels,)
        alike = weights.numel() == 0 or bool(weights.max() - weights.min() <= 1e-3 * weights.min())
        if not alike:
            ctx.refused()
        share = weights.sum() if alike else weights.new_zeros(())
        return grad, None, share.to(ctx.dtype), None


def refuse_sampled() -> None:
    """Refuse to learn from a loss () that was computed outside of the model, under a sampling recipe.

    Raises:
        ContextError: always.
    """
    raise ContextError(SAMPLED)
