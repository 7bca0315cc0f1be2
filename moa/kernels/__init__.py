"""One semantic op, several engines: the weighted sum of low-rank experts, forward and backward.

`low_rank_mixture` is the op, `mixture_linear` the same with its frozen base; `choose_engine` says which
engine runs it, `engines` which of them are available and why the others are not. `grouped_linear` is half of it: each
slot times its own expert's matrix; `gated_linear` is a softmax top-k gate and its mixture in one node of the graph.
"""

from .dispatch import choose_engine, engines
from .gated import gated_linear
from .grouped_linear import grouped_linear
from .low_rank import low_rank_mixture, mixture_linear

__all__ = ["choose_engine", "engines", "gated_linear", "grouped_linear", "low_rank_mixture", "mixture_linear"]
