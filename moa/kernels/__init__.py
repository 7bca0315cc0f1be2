"""One semantic op, several engines: the weighted sum of low-rank experts, forward and backward.

`low_rank_mixture` is the op, `mixture_linear` the same with its frozen base; `choose_engine` says which
engine runs it, `engines` which of them are available and why the others are not; `register_engine` adds one. The halves
of the op are `grouped_linear` and `grouped_sum`: each slot times its own expert's matrix, and the sum over slots.
`gated_linear` is a linear gate (`Gate`) and its mixture in one node of the graph, `headed_linear` a mixture of factors,
head by head, in one node, `exact_linear` a router's logits. `change_mixture` mixes weight changes that have no low
rank; `column_linear` trains a few columns of a weight in place.
"""

from .changes import ByHand, Changes, change_mixture
from .column_linear import column_linear
from .dispatch import choose_engine
from .engine import Operands, engines, has_slots, register_engine
from .exact_linear import exact_linear
from .gate import Gate
from .gated import gated_linear
from .grouped_linear import grouped_linear, grouped_sum
from .headed_linear import headed_linear
from .low_rank import low_rank_mixture, mixture_linear

__all__ = [
    "ByHand",
    "Changes",
    "Gate",
    "Operands",
    "change_mixture",
    "choose_engine",
    "column_linear",
    "engines",
    "exact_linear",
    "gated_linear",
    "grouped_linear",
    "grouped_sum",
    "has_slots",
    "headed_linear",
    "low_rank_mixture",
    "mixture_linear",
    "register_engine",
]
