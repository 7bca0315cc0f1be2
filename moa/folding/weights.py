"""Fold a static mixture into its base weight: exact, or an error that says why not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..delta import all_finite
from ..errors import FoldError, NumericsError
from ..layers import as_weight, matrix
from ..mixture import Branch, Mixture
from ..mixture.change import Change, layer_change, mixed


@torch.no_grad()
def folded_change(mixture: Mixture, task: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the changes of weight (o, i) and bias (o,) that a static mixture equals, in the experts' dtype.

    With y0 = W x + b, branches on the input D x + c and branches on the output S y0 + t:
    y = (W + D + S W) x + b + c + S b + t

    Args:
        mixture: whose base is a dense linear layer or a convolution, then (o, C · kernel).
        task: the inputs are all of this task, for routers that look at it.

    Raises:
        FoldError: the routing depends on the input, the experts are not a weight change, or the base holds no dense
            weight.
        NumericsError: an expert holds NaN or infinity.
    """
    if mixture.why_not_fold is not None:
        raise FoldError(f"{mixture.name}: {mixture.why_not_fold}, so no weight of one layer equals it.")
    if matrix(mixture.base) is None:
        raise FoldError(f"{mixture.name}: a {type(mixture.base).__name__} holds no dense weight to fold into.")

    def static(branch: Branch) -> Change:
        routing = branch.router.constant(task)
        if routing is None or branch.bank.carries_input:
            raise FoldError(_not_constant(mixture, branch, task))
        return mixed(branch.bank, routing.dense())

    change, shift = layer_change(mixture, static)
    dense = change.dense()
    if not all_finite(dense) or (shift is not None and not all_finite(shift)):
        raise NumericsError(
            f"{mixture.name}: its experts hold NaN or infinity, and folding would put that into the base: training "
            "diverged."
        )
    return dense, shift


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
    base: Any = mixture.base
    delta, shift = folded_change(mixture, task)
    base.weight = _sum(base.weight, as_weight(base, delta))
    if shift is not None:
        bias = getattr(base, "bias", None)
        base.bias = _sum(torch.zeros_like(shift, dtype=base.weight.dtype) if bias is None else bias, shift)
    folded: nn.Module = base
    return folded


def _sum(parameter: Tensor, change: Tensor) -> nn.Parameter:
    wide = torch.promote_types(parameter.dtype, change.dtype)
    total = (parameter.to(wide) + change.to(wide)).to(parameter.dtype)
    return nn.Parameter(total.contiguous(), requires_grad=parameter.requires_grad)


def check_untied(model: nn.Module, mixture: Mixture) -> None:
    """Check that no other module uses the weight (o, i) that a mixture folds into, as tied embeddings do.

    Raises:
        FoldError: one does; both are named.
    """
    weight = getattr(mixture.base, "weight", None)
    for name, module in model.named_modules():
        if module is not mixture.base and any(p is weight for p in module._parameters.values() if p is not None):
            raise FoldError(
                f"{mixture.name}: its weight is also that of {name}, which has no mixture: folding would change that "
                "too, or untie what a saved checkpoint ties again. Untie the two before building on it."
            )
