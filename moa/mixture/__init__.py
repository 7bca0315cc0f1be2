"""The layer: a frozen base with branches that add to it, where it sits in a model, and blocks that share a routing."""

from ..layers import Site
from .base_experts import fused_experts
from .carriers import summary
from .experts_mixture import ExpertsMixture, experts_branches, matrix_sites
from .inject import copy_sharing, inject, placement, take_out
from .mixture import BlockMixture, Branch, ConvMixture, Mixture, plain_weight
from .narrow import Narrowing
from .parallel import parallel_layers
from .placed import mixture_on
from .sites import (
    GROUPS,
    all_sites,
    backbone_prefix,
    block_sites,
    feed_forward_blocks,
    find_blocks,
    find_sites,
    linear_sites,
    named_sites,
)
from .sublayers import find_sublayers
from .unadapted import without_sizes

__all__ = [
    "GROUPS",
    "BlockMixture",
    "Branch",
    "ConvMixture",
    "ExpertsMixture",
    "Mixture",
    "Narrowing",
    "Site",
    "all_sites",
    "backbone_prefix",
    "block_sites",
    "copy_sharing",
    "experts_branches",
    "feed_forward_blocks",
    "find_blocks",
    "find_sites",
    "find_sublayers",
    "fused_experts",
    "inject",
    "linear_sites",
    "matrix_sites",
    "mixture_on",
    "named_sites",
    "parallel_layers",
    "placement",
    "plain_weight",
    "summary",
    "take_out",
    "without_sizes",
]
