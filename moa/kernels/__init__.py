"""One semantic op, several engines: the weighted sum of low-rank experts, forward and backward.

`low_rank_mixture` is the op, `mixture_linear` the same with its frozen base; `choose_engine` says which
engine runs it, `engines` which of them are available and why the others are not. `grouped_linear` and `grouped_sum` are
its halves: each slot times its own expert's matrix, and the sum over slots. `gated_linear` is a softmax top-k gate and
its mixture in one node of the graph.
"""

from .dispatch import choose_engine, engines
from .gated import gated_linear
from .grouped_linear import GROUPED_ENGINES, grouped_linear, grouped_sum
from .low_rank import low_rank_mixture, mixture_linear

__all__ = [
    "GROUPED_ENGINES",
    "choose_engine",
    "engines",
    "gated_linear",
    "grouped_linear",
    "grouped_sum",
    "low_rank_mixture",
    "mixture_linear",
]
