"""The layer: a frozen base with branches that add to it, where it sits in a model, and blocks that share a routing."""

from .inject import copy_sharing, inject, placement, take_out
from .mixture import Branch, ConvMixture, Mixture, mixture_on, pinned_routing, plain_weight
from .sites import Site, backbone_prefix, feed_forward_blocks, find_sites, linear_sites

__all__ = [
    "Branch",
    "ConvMixture",
    "Mixture",
    "Site",
    "backbone_prefix",
    "copy_sharing",
    "feed_forward_blocks",
    "find_sites",
    "inject",
    "linear_sites",
    "mixture_on",
    "pinned_routing",
    "placement",
    "plain_weight",
    "take_out",
]
