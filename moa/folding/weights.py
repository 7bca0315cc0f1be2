"""Fold a static mixture into its base weight: exact, or an error that says why not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..delta import all_finite
from ..errors import FoldError, NumericsError
from ..mixture import Branch, Mixture
from ..mixture.change import Change, layer_change, mixed
from ..offload import execution_device


@torch.no_grad()
def folded_change(mixture: Mixture, task: int | None = None) -> dict[str, Tensor]:
    """Return what a static mixture adds to the parameters of its base, by name, in the experts' dtype.

    With y0 = W x + b, branches on the input D x + c and branches on the output S y0 + t:
    y = (W + D + S W) x + b + c + S b + t

    Args:
        mixture: whose base is a dense linear layer, a convolution, then (o, C · kernel), or fused experts (N, o, i).
        task: the inputs are all of this task, for routers that look at it.

    Raises:
        FoldError: the routing depends on the input, the experts are not a weight change, or the base holds no dense
            weight, or a place for what they add to every row.
        NumericsError: an expert holds NaN or infinity; the layer and the tensor are named.
    """
    if mixture.why_not_fold is not None:
        raise FoldError(f"{mixture.name}: {mixture.why_not_fold}, so no weight of one layer equals it.")

    def static(branch: Branch) -> Change:
        routing = branch.router.constant(task)
        if routing is None or branch.bank.carries_input:
            raise FoldError(_not_constant(mixture, branch, task))
        return mixed(branch.bank, routing.dense())

    if not mixture.is_dense():
        raise FoldError(f"{mixture.name}: {not_at_hand(mixture.base)}")
    found: dict[str, Tensor] = {}
    for part in mixture.slices():
        changes = [layer_change(layer, static) for layer in part.layers]
        found |= mixture.stored(part, [(change.dense(), shift) for change, shift in changes])
    if not all(all_finite(change) for change in found.values()):
        wrong = [key for key, value in mixture.branches.state_dict().items() if not all_finite(value)]
        raise NumericsError(
            f"{mixture.name}: {', '.join(wrong) or 'what its experts add'} holds NaN or infinity, and folding "
            "would put that into the base: training diverged."
        )
    return found


def not_at_hand(base: nn.Module) -> str:
    """Return why a layer (i -> o) without a dense weight at hand has none to change, and what to do."""
    kind = type(base).__name__
    if execution_device(base) is None:
        return f"a {kind} holds no dense weight to fold into."
    return (
        f"the weight of this {kind} is offloaded, and comes back as it was each time the layer runs: load the base "
        "whole, put the experts on it with moa.load, and fold there."
    )


def _not_constant(mixture: Mixture, branch: Branch, task: int | None) -> str:
    kind = type(branch.router).__name__
    known = branch.router.known_tasks
    if known is not None:
        which = "no task was named" if task is None else f"task {task} is none of them"
        return (
            f"{mixture.name}: the routing of {kind} depends on the task ({known.start} to {known.stop - 1}) and "
            f"{which}: fold for one of them with merge_and_unload(task_id=…)."
        )
    return (
        f"{mixture.name}: the routing of {kind} depends on the input, so the mixture is not one weight. "
        "Export its experts one by one (moa.export_expert)."
    )


@torch.no_grad()
def fold(mixture: Mixture, task: int | None = None) -> nn.Module:
    """Return the base layer (i -> o) with new parameters: its weight and bias plus the mixture.

    The sums are formed in fp32 at least and rounded once to the base's dtype. A base without a bias gets one where
    the mixture adds a constant. The old parameters are not written to: another model may share them.

    Args:
        mixture: to fold.
        task: fold what the inputs of this task get.

    Raises:
        FoldError: no exact weight exists, or the base's weight is quantised.
    """
    base = mixture.base
    changes = folded_change(mixture, task)
    dtype = getattr(base, next(iter(changes))).dtype
    for name, change in changes.items():
        old = getattr(base, name, None)
        setattr(base, name, _sum(torch.zeros_like(change, dtype=dtype) if old is None else old, change))
    return base


def _sum(parameter: Tensor, change: Tensor) -> nn.Parameter:
    wide = torch.promote_types(parameter.dtype, change.dtype)
    total = (parameter.to(wide) + change.to(wide)).to(parameter.dtype)
    return nn.Parameter(total.contiguous(), requires_grad=parameter.requires_grad)


def check_untied(model: nn.Module, mixture: Mixture) -> None:
    """Check that no other module uses a weight (o, i) that a mixture folds into, as tied embeddings do.

    Raises:
        FoldError: one does; both are named.
    """
    weights = {id(getattr(mixture.base, part.weight, None)) for part in mixture.slices()}
    for name, module in model.named_modules():
        if module is not mixture.base and any(id(p) in weights for p in module._parameters.values() if p is not None):
            raise FoldError(
                f"{mixture.name}: its weight is also that of {name}, which has no mixture: folding would change that "
                "too, or untie what a saved checkpoint ties again. Untie the two before building on it."
            )
