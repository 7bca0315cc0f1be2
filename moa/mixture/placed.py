"""Which mixture fits what it sits on."""

from __future__ import annotations

from torch import nn

from ..layers import features, is_convolution
from ..types import Scope
from .experts_mixture import ExpertsMixture
from .fused_layouts import layout_of
from .mixture import BlockMixture, Branch, ConvMixture, Mixture


def mixture_on(base: nn.Module, branches: list[Branch], scope: Scope, name: str) -> Mixture:
    """Return the mixture that fits a layer, linear (*rows, i) -> (*rows, o) or a convolution, fused experts or a block.

    Args:
        base, branches, scope, name: see `Mixture`.
    """
    if layout_of(base) is not None:
        return ExpertsMixture(base, branches, scope, name)
    if features(base) is None:
        return BlockMixture(base, branches, scope, name)
    return (ConvMixture if is_convolution(base) else Mixture)(base, branches, scope, name)
