"""Fold a static mixture into its base weight: exact, or an error that says why not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import FoldError
from .mixture import Branch, Mixture, is_conv1d


def folded_delta(mixture: Mixture) -> Tensor:
    """Return the weight change (o, i) that a static mixture equals, Σ_e w_e delta_e, in the experts' dtype.

    Raises:
        FoldError: the routing depends on the input, a branch taps the output, or the experts mix their parameters.
    """
    total: Tensor | None = None
    for branch in mixture.branches:
        assert isinstance(branch, Branch)
        routing = branch.router.constant()
        kind = type(branch.router).__name__
        if routing is None:
            raise FoldError(
                f"{mixture.name}: the routing of {kind} depends on the input, so the mixture is not one weight. "
                "Export its experts one by one (moa.export_expert)."
            )
        if branch.tap != "input" or branch.bank.mixes != "outputs":
            raise FoldError(f"{mixture.name}: a {type(branch.bank).__name__} on the {branch.tap} has no fold here.")
        weights = routing.dense()
        for expert in range(branch.bank.n_experts):
            term = branch.bank.delta(expert) * weights[expert]
            total = term if total is None else total + term
    if total is None:
        raise FoldError(f"{mixture.name} has no branch to fold.")
    return total


@torch.no_grad()
def fold(mixture: Mixture) -> nn.Module:
    """Return the base layer (i -> o) with the mixture added to its weight, changed in place.

    The sum is formed in fp32 at least and rounded once to the base's dtype.

    Raises:
        FoldError: no exact weight exists, or the base's weight is quantised.
    """
    base = mixture.base
    weight = base.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise FoldError(f"{mixture.name}: a {type(base).__name__} holds no dense weight to fold into.")
    delta = folded_delta(mixture)
    if is_conv1d(base):
        delta = delta.T
    wide = torch.promote_types(weight.dtype, delta.dtype)
    weight.copy_((weight.to(wide) + delta.to(wide)).to(weight.dtype))
    return base
